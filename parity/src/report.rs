//! What came of a case: comparisons, each an error beside what is allowed for it.

use std::fmt;

/// One comparison: the error, what is allowed, and how much of that was used.
#[derive(Debug)]
struct Comparison {
    what: String,
    error: f64,
    allowed: f64,
}

impl Comparison {
    fn used(&self) -> f64 {
        match (self.error == 0.0, self.error.is_nan()) {
            (true, _) => 0.0,
            (_, true) => f64::INFINITY,
            _ => self.error / self.allowed,
        }
    }
}

/// All comparisons of a case; shown as a line with the one that used up most of its tolerance.
#[derive(Debug)]
pub struct Report {
    case: String,
    comparisons: Vec<Comparison>,
}

impl Report {
    /// A case in which nothing is compared yet.
    pub fn new(case: &str) -> Self {
        Self { case: case.to_owned(), comparisons: Vec::new() }
    }

    /// A case without a comparison has shown nothing.
    pub fn passed(&self) -> bool {
        !self.comparisons.is_empty() && self.comparisons.iter().all(|comparison| comparison.used() <= 1.0)
    }

    /// Whole things that must be equal; counts those that are not.
    pub fn equal<T: PartialEq>(&mut self, what: &str, got: &[T], expected: &[T]) {
        let different = got.iter().zip(expected).filter(|(got, expected)| got != expected).count();
        self.push(what, (different + got.len().abs_diff(expected.len())) as f64, 0.0);
    }

    /// An error that must not be larger than what is allowed for it.
    pub fn push(&mut self, what: &str, error: f64, allowed: f64) {
        self.comparisons.push(Comparison { what: what.to_owned(), error, allowed });
    }

    /// A number that may be off by an absolute and a relative share.
    pub fn close(&mut self, what: &str, got: f64, expected: f64, [absolute, relative]: [f64; 2]) {
        self.push(what, (got - expected).abs(), absolute + relative * expected.abs());
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = if self.passed() { "ok  " } else { "FAIL" };
        let worst = self.comparisons.iter().max_by(|a, b| a.used().total_cmp(&b.used()));
        match worst {
            None => write!(f, "{mark}  {}: nothing was compared", self.case),
            Some(Comparison { what, error, allowed }) => {
                let count = self.comparisons.len();
                write!(f, "{mark}  {}: error {error:.2e} of {allowed:.2e} ({what}; {count} comparisons)", self.case)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_passes_if_something_was_compared_and_nothing_is_off() {
        let mut report = Report::new("a");
        assert!(!report.passed());
        report.close("sum", 1.02, 1.0, [0.01, 0.02]);
        report.equal("ids", &[1, 2], &[1, 2]);
        assert!(report.passed());
        assert_eq!(report.to_string(), "ok    a: error 2.00e-2 of 3.00e-2 (sum; 2 comparisons)");
        report.equal("ids", &[1, 3], &[1, 2, 4]);
        assert!(!report.passed());
        assert_eq!(report.to_string(), "FAIL  a: error 2.00e0 of 0.00e0 (ids; 3 comparisons)");
    }

    #[test]
    fn a_number_that_is_none_fails() {
        let mut report = Report::new("a");
        report.close("loss", f64::NAN, 1.0, [1.0, 1.0]);
        assert!(!report.passed());
    }
}

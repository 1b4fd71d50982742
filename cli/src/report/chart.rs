//! Curves over steps as inline SVG: thin values, a bold smoothed line, few round ticks.

use std::fmt::Write as _;

use crate::text;

/// One curve.
pub(super) struct Chart<'a> {
    /// What the values are.
    pub title: &'a str,
    /// Step and value; values that are not finite leave a gap.
    pub points: Vec<(f64, f64)>,
    /// Another curve in the same units, of few values; empty if there is none.
    pub second: Vec<(f64, f64)>,
    /// Draw a smoothed line over the values.
    pub smooth: bool,
    /// Height in the units of the drawing, whose width is [`WIDTH`].
    pub height: f64,
}

const WIDTH: f64 = 800.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 26.0;

/// Points beyond which values are averaged: about one for each pixel.
const POINTS: usize = 800;

impl Chart<'_> {
    /// The drawing; empty if there is nothing to draw.
    pub(super) fn svg(&self) -> String {
        let finite: Vec<_> = self.points.iter().copied().filter(|(_, value)| value.is_finite()).collect();
        let (Some(first), Some(last)) = (finite.first(), finite.last()) else { return String::new() };
        let second: Vec<_> = self.second.iter().copied().filter(|(_, value)| value.is_finite()).collect();
        let start = second.first().map_or(first.0, |point| point.0.min(first.0));
        let end = second.last().map_or(last.0, |point| point.0.max(last.0)).max(start + 1.0);
        let smoothed = if self.smooth { smooth(&finite) } else { Vec::new() };
        let (low, high) = range(&finite, &second, self.smooth);
        let ticks = ticks(low, high, (self.height / 45.0).max(2.0) as usize);
        let x = |step: f64| LEFT + (step - start) / (end - start) * (WIDTH - LEFT - RIGHT);
        let y = |value: f64| {
            let share = ((value - low) / (high - low)).clamp(0.0, 1.0);
            self.height - BOTTOM - share * (self.height - TOP - BOTTOM)
        };
        let label = format!(
            "{} over {} steps: first {}, last {}",
            self.title,
            text::thousands(end as u64),
            text::real(first.1),
            text::real(smoothed.last().map_or(last.1, |point| point.1))
        );
        let mut svg = format!(
            "<svg class=\"chart\" viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"{label}\"><title>{label}</title>",
            self.height
        );
        for tick in &ticks {
            let at = y(*tick);
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
                 <text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                WIDTH - RIGHT,
                LEFT - 8.0,
                at + 4.0,
                text::real(*tick)
            );
        }
        for tick in crate::report::chart::ticks(start, end, 8) {
            let _ = write!(
                svg,
                "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                x(tick),
                self.height - 8.0,
                text::thousands(tick as u64)
            );
        }
        let class = if self.smooth { "raw" } else { "line" };
        let _ = write!(svg, "<path class=\"{class}\" d=\"{}\"/>", path(&averaged(&self.points), x, y));
        if self.smooth {
            let _ = write!(svg, "<path class=\"line\" d=\"{}\"/>", path(&averaged(&smoothed), x, y));
        }
        if !second.is_empty() {
            let _ = write!(svg, "<path class=\"second\" d=\"{}\"/>", path(&averaged(&second), x, y));
        }
        for (step, value) in averaged(&second) {
            let (x, y) = (x(step), y(value));
            let _ = write!(svg, "<circle class=\"dot\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>");
        }
        svg + "</svg>"
    }
}

/// The values that the drawing spans, all of `second` among them. Single wild values of the first do not flatten the rest:
/// they are cut at the edge.
fn range(points: &[(f64, f64)], second: &[(f64, f64)], robust: bool) -> (f64, f64) {
    let mut values: Vec<f64> = points.iter().map(|point| point.1).collect();
    values.sort_unstable_by(f64::total_cmp);
    let last = values.len() - 1;
    let (low, high) = match robust {
        true => (values[last / 200], values[last - last / 200]),
        false => (values[0].min(0.0), values[last]),
    };
    let (low, high) =
        second.iter().fold((low, high), |(low, high), (_, value)| (f64::min(low, *value), f64::max(high, *value)));
    let pad = (high - low) * 0.05;
    if pad > 0.0 {
        ((low - pad).max(if low >= 0.0 { 0.0 } else { f64::MIN }), high + pad)
    } else {
        (low - 1.0, high + 1.0)
    }
}

/// Round numbers inside `low..=high`, about `wanted` of them.
fn ticks(low: f64, high: f64, wanted: usize) -> Vec<f64> {
    let rough = (high - low) / wanted.max(1) as f64;
    let power = 10f64.powf(rough.log10().floor());
    let step =
        [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|step| *step >= rough).unwrap_or(rough);
    let mut ticks = Vec::new();
    let mut number = (low / step).ceil();
    while number * step <= high && ticks.len() < 50 {
        ticks.push(number * step);
        number += 1.0;
    }
    ticks
}

/// An exponential mean over about a twentieth of the curve, without the pull to zero at its start.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let keep = 1.0 - 1.0 / (points.len() as f64 / 20.0).max(1.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    points
        .iter()
        .map(|(step, value)| {
            sum = keep * sum + value;
            weight = keep * weight + 1.0;
            (*step, sum / weight)
        })
        .collect()
}

/// At most [`POINTS`] points, each the mean of its neighbours; a gap stays one.
fn averaged(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= POINTS {
        return points.to_vec();
    }
    points
        .chunks(points.len().div_ceil(POINTS))
        .map(|chunk| {
            let count = chunk.len() as f64;
            (
                chunk.iter().map(|point| point.0).sum::<f64>() / count,
                chunk.iter().map(|point| point.1).sum::<f64>() / count,
            )
        })
        .collect()
}

fn path(points: &[(f64, f64)], x: impl Fn(f64) -> f64, y: impl Fn(f64) -> f64) -> String {
    let mut path = String::new();
    let mut pen_down = false;
    for (step, value) in points {
        if !value.is_finite() {
            pen_down = false;
            continue;
        }
        let _ = write!(path, "{}{:.1} {:.1}", if pen_down { 'L' } else { 'M' }, x(*step), y(*value));
        pen_down = true;
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 1.0, 5), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        assert_eq!(ticks(1.0, 800.0, 8), [100.0, 200.0, 300.0, 400.0, 500.0, 600.0, 700.0, 800.0]);
        assert_eq!(ticks(0.031, 0.0312, 2), [0.031, 0.031100000000000003, 0.031200000000000002][..2]);
    }

    #[test]
    fn a_constant_curve_has_a_height() {
        let chart = Chart {
            title: "lr",
            points: vec![(1.0, 1e-4), (2.0, 1e-4)],
            second: Vec::new(),
            smooth: false,
            height: 100.0,
        };
        let svg = chart.svg();
        assert!(svg.contains("<path") && !svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn one_wild_value_does_not_flatten_the_rest() {
        let mut points: Vec<_> = (0..1000).map(|step| (step as f64, 0.1 + (step % 7) as f64 * 0.01)).collect();
        points[500].1 = 1e6;
        assert!(range(&points, &[], true).1 < 1.0);
    }

    #[test]
    fn smoothing_keeps_a_constant() {
        let points: Vec<_> = (0..100).map(|step| (step as f64, 3.0)).collect();
        assert!(smooth(&points).iter().all(|point| (point.1 - 3.0).abs() < 1e-12));
    }

    #[test]
    fn a_gap_lifts_the_pen() {
        let points = [(0.0, 1.0), (1.0, f64::NAN), (2.0, 1.0), (3.0, 1.0)];
        assert_eq!(path(&points, |x| x, |y| y), "M0.0 1.0M2.0 1.0L3.0 1.0");
    }
}

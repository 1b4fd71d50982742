//! Texts that end a generation: found as soon as they are complete, never shown, not even in part.

/// Watches a text that comes in pieces for the strings that end it.
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    /// The end of the text so far that may be the beginning of a stop string.
    held: String,
}

/// What to show of a piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// Text that is certain not to belong to a stop string.
    pub text: String,
    /// Whether the text has come to its end.
    pub stopped: bool,
}

impl StopStrings {
    /// Watches for these; empty ones are ignored.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        Self { stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(), held: String::new() }
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, piece: &str) -> Shown {
        let mut text = std::mem::take(&mut self.held);
        text.push_str(piece);
        if let Some(at) = self.stops.iter().filter_map(|stop| text.find(&**stop)).min() {
            text.truncate(at);
            return Shown { text, stopped: true };
        }
        let kept = self.stops.iter().map(|stop| begun(&text, stop)).max().unwrap_or(0);
        self.held = text.split_off(text.len() - kept);
        Shown { text, stopped: false }
    }

    /// The text that was held back when nothing more comes.
    pub fn finish(self) -> String {
        self.held
    }
}

/// Bytes at the end of the text that are the beginning of the string.
fn begun(text: &str, stop: &str) -> usize {
    let beginnings = stop.char_indices().map(|(at, _)| at).skip(1);
    beginnings.filter(|at| text.ends_with(&stop[..*at])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(stops: &[&str], pieces: &[&str], shown: &[&str], stopped: bool) {
        let mut watch = StopStrings::new(stops.iter().map(|stop| (*stop).to_owned()));
        let mut out: Vec<String> = Vec::new();
        for piece in pieces {
            let next = watch.push(piece);
            out.push(next.text);
            if next.stopped {
                assert!(stopped);
                assert_eq!(out, shown);
                return;
            }
        }
        assert!(!stopped);
        out.push(watch.finish());
        assert_eq!(out, shown);
    }

    #[test]
    fn no_part_of_a_stop_string_is_shown() {
        check(&["\nUser:"], &["Hi!", "\n", "Us", "er:", "x"], &["Hi!", "", "", ""], true);
        check(&["\nUser:"], &["Hi!\nUs", "a"], &["Hi!", "\nUsa", ""], false);
        check(&["END"], &["abENDcd"], &["ab"], true);
    }

    #[test]
    fn the_earliest_of_several_counts() {
        check(&["bc", "ab", ""], &["xxa", "bc"], &["xx", ""], true);
        check(&["aab"], &["aa", "ab", "z"], &["", "a"], true);
        check(&["é🙂"], &["é", "é", "🙂"], &["", "é", ""], true);
    }

    #[test]
    fn what_was_held_back_comes_out_at_the_end() {
        check(&["STOP"], &["ST", "O"], &["", "", "STO"], false);
        check(&[], &["a", "b"], &["a", "b", ""], false);
    }
}

//! Numbers, paths and lines as people read them.

use std::path::{Path, PathBuf};

use serde::Serializer;

/// Bytes in binary units: `45.1 MiB`.
pub fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{} {}", three_digits(value), units[unit]) }
}

/// A count in thousands, millions or billions: `23.2 M`.
pub fn count(count: u64) -> String {
    match count {
        0..10_000 => thousands(count),
        10_000..1_000_000 => format!("{} k", three_digits(count as f64 / 1e3)),
        1_000_000..1_000_000_000 => format!("{} M", three_digits(count as f64 / 1e6)),
        _ => format!("{} G", three_digits(count as f64 / 1e9)),
    }
}

/// A count with its thousands apart: `1 500`.
pub fn thousands(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// A time span: `0.3 s`, `42 s`, `9:26`, `1:02:03`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "?".into();
    }
    if seconds < 9.95 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{whole} s"),
        60..3600 => format!("{}:{:02}", whole / 60, whole % 60),
        _ => format!("{}:{:02}:{:02}", whole / 3600, whole / 60 % 60, whole % 60),
    }
}

/// A rough time span for estimates: `40 s`, `38 min`, `2.5 h`.
pub fn estimate(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        "?".into()
    } else if seconds < 90.0 {
        format!("{} s", seconds.ceil())
    } else if seconds < 5400.0 {
        format!("{:.0} min", seconds / 60.0)
    } else {
        format!("{:.1} h", seconds / 3600.0)
    }
}

/// A small or large real number in few characters: `0.0871`, `1e-4`, `12.5`.
pub fn real(value: f64) -> String {
    digits(value, 4)
}

/// A real number with at most that many significant digits, unless there are more before the point.
pub fn digits(value: f64, digits: i32) -> String {
    let size = value.abs();
    if !value.is_finite() || value == 0.0 {
        return value.to_string();
    }
    if !(1e-3..1e6).contains(&size) {
        let text = format!("{value:.2e}");
        let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        return format!("{}e{exponent}", mantissa.trim_end_matches('0').trim_end_matches('.'));
    }
    let decimals = (digits - 1 - size.log10().floor() as i32).clamp(0, 6) as usize;
    let text = format!("{value:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// A path as a person would write it: from the working folder, where it lies inside.
pub fn path(path: &Path) -> String {
    let here = std::env::current_dir().ok();
    let inside = here.and_then(|here| path.strip_prefix(here).ok()).filter(|inside| !inside.as_os_str().is_empty());
    inside.unwrap_or(path).display().to_string()
}

/// A path for programs, for `serialize_with`: what is no UTF-8 in it is replaced, where serde would give up.
///
/// # Errors
/// Those of the serializer.
pub fn lossy<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

/// [`lossy`] for a path that may be absent.
///
/// # Errors
/// Those of the serializer.
pub fn lossy_if_any<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    match path {
        Some(path) => lossy(path, serializer),
        None => serializer.serialize_none(),
    }
}

/// `1 picture`, `2 pictures`.
pub fn plural(count: u64, one: &str) -> String {
    format!("{} {one}{}", thousands(count), if count == 1 { "" } else { "s" })
}

/// The columns that a text takes on a terminal, as far as one character is one column.
pub fn width(text: &str) -> usize {
    text.chars().count()
}

/// `text` cut to `columns`, the cut shown.
pub fn ellipsis(text: &str, columns: usize) -> String {
    if width(text) <= columns {
        return text.to_owned();
    }
    text.chars().take(columns.saturating_sub(1)).chain(['…']).collect()
}

/// Words broken into lines of at most `columns`; a longer word has a line of its own.
pub fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("there is always a line");
        if line.is_empty() {
            line.push_str(word);
        } else if width(line) + 1 + width(word) <= columns {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

fn three_digits(value: f64) -> String {
    if value < 99.95 { format!("{value:.1}") } else { format!("{value:.0}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1.0 KiB");
        assert_eq!(bytes(47_290_000), "45.1 MiB");
        assert_eq!(count(23_200_000), "23.2 M");
        assert_eq!(count(9_999), "9 999");
        assert_eq!(thousands(1_234_567), "1 234 567");
        assert_eq!(duration(0.34), "0.3 s");
        assert_eq!(duration(59.7), "1:00");
        assert_eq!(duration(3723.0), "1:02:03");
        assert_eq!(duration(f64::NAN), "?");
        assert_eq!(estimate(2280.0), "38 min");
        assert_eq!(real(1e-4), "1e-4");
        assert_eq!(real(0.08712), "0.08712");
        assert_eq!(digits(0.08712, 2), "0.087");
        assert_eq!(real(12.5), "12.5");
        assert_eq!(real(2.0), "2");
        assert_eq!(real(1234.0), "1234");
        assert_eq!(plural(1, "step"), "1 step");
    }

    #[test]
    fn wrapped_text_keeps_its_words() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("", 7), [""]);
        assert_eq!(ellipsis("abcdef", 4), "abc…");
    }
}

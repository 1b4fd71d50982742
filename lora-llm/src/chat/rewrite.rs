//! The two tags of `transformers` that Jinja does not have: `{% generation %}` … `{% endgeneration %}`.
//!
//! They mark what the model wrote. `minijinja` cannot be taught tags, so they are spelled as a filter block, which has the
//! same beginning, the same end and the same rules about blanks and line breaks: no other letter of the template moves.

use std::borrow::Cow;

/// The filter that stands for the tags.
pub(super) const FILTER: &str = "lora_generation";

/// The template in Jinja proper, and whether it has the tags.
pub(super) fn rewrite(source: &str) -> (Cow<'_, str>, bool) {
    let mut out = String::new();
    let (mut copied, mut at) = (0, 0);
    while let Some(found) = source[at..].find('{') {
        let start = at + found;
        let rest = &source[start..];
        if rest.starts_with("{#") {
            at = rest.find("#}").map_or(source.len(), |end| start + end + 2);
        } else if rest.starts_with("{{") {
            at = start + after_code(rest, "}}");
        } else if rest.starts_with("{%") {
            let end = start + after_code(rest, "%}");
            let tag = source[start + 2..end].trim_end_matches("%}");
            let inner = tag.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
            let replacement = match inner {
                "generation" => Some(format!("filter {FILTER}")),
                "endgeneration" => Some("endfilter".to_owned()),
                _ => None,
            };
            at = end;
            if let Some(replacement) = replacement {
                let word = start + 2 + tag.find(inner).unwrap_or(0);
                out.push_str(&source[copied..word]);
                out.push_str(&replacement);
                copied = word + inner.len();
            } else if inner == "raw" {
                at = end_of_raw(source, end);
            }
        } else {
            at = start + 1;
        }
    }
    if copied == 0 {
        return (Cow::Borrowed(source), false);
    }
    out.push_str(&source[copied..]);
    (Cow::Owned(out), true)
}

/// Length of a tag up to and with its end, which may also stand in a string within it.
fn after_code(tag: &str, end: &str) -> usize {
    let mut quote: Option<char> = None;
    let mut escaped = false;
    for (at, letter) in tag.char_indices().skip(2) {
        match quote {
            Some(open) => {
                if !escaped && letter == open {
                    quote = None;
                }
                escaped = !escaped && letter == '\\';
            }
            None if tag[at..].starts_with(end) => return at + end.len(),
            None if letter == '\'' || letter == '"' => quote = Some(letter),
            None => {}
        }
    }
    tag.len()
}

fn end_of_raw(source: &str, from: usize) -> usize {
    let mut at = from;
    while let Some(found) = source[at..].find("{%") {
        let tag = source[at + found + 2..].trim_start_matches(['-', '+']).trim_start();
        at += found + 2;
        if tag.starts_with("endraw") {
            return at;
        }
    }
    source.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(source: &str, expected: &str) {
        assert_eq!(rewrite(source).0, expected);
    }

    #[test]
    fn tags_keep_their_dashes_and_blanks() {
        check("a{%- generation -%} b {% endgeneration %}", "a{%- filter lora_generation -%} b {% endfilter %}");
        check("{%generation%}{%-endgeneration%}", "{%filter lora_generation%}{%-endfilter%}");
    }

    #[test]
    fn only_tags_are_changed() {
        for same in [
            "{{ generation }}{% if generation %}{% endif %}",
            "{# {% generation %} #}",
            "{{ '{% generation %}' }}",
            "{% raw %}{% generation %}{% endraw %}",
            "{% set x = \"%}{% generation %}\" %}",
            "{% set x = 'it\\'s %}' %} { % generation % }",
            "{% unfinished",
        ] {
            let (text, tagged) = rewrite(same);
            assert_eq!((&*text, tagged), (same, false));
        }
    }
}

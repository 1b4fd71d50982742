//! What is changed in a template before `minijinja` sees it. Lines, blanks and line breaks stay where they are.
//!
//! - `{% generation %}` … `{% endgeneration %}`, the two tags of `transformers` that Jinja does not have. They mark what the
//!   model wrote. `minijinja` cannot be taught tags, so they are spelled as a filter block, which begins and ends by the
//!   same rules.
//! - `{% set x = value %}` becomes `{% set x = (value)|filter %}` with a filter that refuses values nested without end. A
//!   template that puts a list into itself a hundred thousand times would else exhaust the stack when the list is dropped,
//!   and end the program: it is a stranger's code.
//! - `{% for x in value %}` becomes `{% for x in (value)|filter %}` with a filter that refuses `None`, as Python does, and
//!   makes a list of a text, of which `minijinja` does not know the last letter (`loop.last`).
//! - `'%s' % x` becomes a filter; see [`percent`].

use std::borrow::Cow;

use super::percent;

/// The filter that stands for the tags.
pub(super) const GENERATION: &str = "lora_generation";

/// The filter that every value passes through when it is given a name.
pub(super) const STORED: &str = "lora_stored";

/// The filter that everything passes through that is gone through.
pub(super) const EACH: &str = "lora_each";

/// The template in Jinja proper, and whether it has the tags of `transformers`.
pub(super) fn rewrite(source: &str) -> (Cow<'_, str>, bool) {
    let mut out = String::new();
    let (mut copied, mut at) = (0, 0);
    let mut tagged = false;
    while let Some(found) = source[at..].find('{') {
        let start = at + found;
        let rest = &source[start..];
        if rest.starts_with("{#") {
            at = rest.find("#}").map_or(source.len(), |end| start + end + 2);
        } else if rest.starts_with("{{") {
            at = start + after_code(rest, "}}");
            if let Some(code) = percent::rewrite(&source[start + 2..at]) {
                out.push_str(&source[copied..start + 2]);
                out.push_str(&code);
                copied = at;
            }
        } else if rest.starts_with("{%") {
            let end = start + after_code(rest, "%}");
            let tag = source[start + 2..end].trim_end_matches("%}");
            let inner = tag.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
            let replacement = match inner {
                "generation" => Some(format!("filter {GENERATION}")),
                "endgeneration" => Some("endfilter".to_owned()),
                _ => {
                    let formatted = percent::rewrite(inner);
                    let code = formatted.as_deref().unwrap_or(inner);
                    assignment(code).or_else(|| iteration(code)).or_else(|| formatted.clone())
                }
            };
            tagged |= inner == "generation";
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
    (Cow::Owned(out), tagged)
}

/// `set target = value` with the value through the filter; `None` for every other tag, also a `set` with a body.
fn assignment(tag: &str) -> Option<String> {
    let rest = tag.strip_prefix("set").filter(|rest| rest.starts_with(|letter: char| letter.is_ascii_whitespace()))?;
    let (target, value) = rest.split_once('=')?;
    let name = |letter: char| letter.is_alphanumeric() || letter.is_ascii_whitespace() || "_.,()".contains(letter);
    // What belongs to a namespace can come to contain it.
    let field = if target.contains('.') { "(true)" } else { "" };
    target.chars().all(name).then(|| format!("set{target}= ({value})|{STORED}{field}"))
}

/// `for target in list` with the list through the filter; a condition and `recursive` stay behind it.
fn iteration(tag: &str) -> Option<String> {
    let rest = tag.strip_prefix("for").filter(|rest| rest.starts_with(|letter: char| letter.is_ascii_whitespace()))?;
    let (target, list) = rest.split_at(word(rest, "in")?);
    let list = list.strip_prefix("in")?;
    let end = ["if", "recursive"].into_iter().filter_map(|keyword| word(list, keyword)).min().unwrap_or(list.len());
    let (list, condition) = list.split_at(end);
    let gap = if condition.is_empty() { "" } else { " " };
    Some(format!("for{target}in ({list})|{EACH}{gap}{condition}"))
}

/// Where a word stands in code, outside brackets and strings.
fn word(code: &str, wanted: &str) -> Option<usize> {
    let (mut depth, mut quote, mut escaped) = (0i32, None, false);
    let mut before = ' ';
    let part = |letter: char| letter.is_alphanumeric() || letter == '_' || letter == '.';
    for (at, letter) in code.char_indices() {
        match quote {
            Some(open) => {
                if !escaped && letter == open {
                    quote = None;
                }
                escaped = !escaped && letter == '\\';
            }
            None => match letter {
                '\'' | '"' => quote = Some(letter),
                '(' | '[' | '{' => depth += 1,
                ')' | ']' | '}' => depth -= 1,
                _ if depth == 0 && !part(before) && code[at..].starts_with(wanted) => {
                    let after = code[at + wanted.len()..].chars().next();
                    if after.is_none_or(|after| !part(after)) {
                        return Some(at);
                    }
                }
                _ => {}
            },
        }
        before = letter;
    }
    None
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
    fn values_pass_through_the_filter() {
        check("{%- set x = a == 'b=c' -%}", "{%- set x = ( a == 'b=c')|lora_stored -%}");
        check("{% set ns.x=\n 1, 2 %}", "{% set ns.x= (\n 1, 2)|lora_stored(true) %}");
    }

    #[test]
    fn lists_pass_through_the_filter() {
        check("{% for x in list -%}", "{% for x in ( list)|lora_each -%}");
        check(
            "{% for inner, b in (x if y else z)[' if '] if b in inner recursive %}",
            "{% for inner, b in ( (x if y else z)[' if '] )|lora_each if b in inner recursive %}",
        );
    }

    #[test]
    fn only_tags_are_changed() {
        for same in [
            "{{ generation }}{% if generation %}{% endif %}",
            "{# {% generation %} #}",
            "{{ '{% generation %}' }}",
            "{% raw %}{% generation %}{% endraw %}",
            "{% if x == \"%}{% generation %}\" %}",
            "{% if x == 'it\\'s %}' %} { % generation % }",
            "{% set x %}{% endset %}{% set x | replace('a', b='=') %}{% settle a=b %}",
            "{% unfinished",
        ] {
            let (text, tagged) = rewrite(same);
            assert_eq!((&*text, tagged), (same, false));
        }
    }
}

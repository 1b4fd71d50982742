//! `'%s: %d' % (a, b)`, which Python's strings have and `minijinja`'s do not: spelled as a filter.
//!
//! Only a string in quotes can stand before the sign; without types, any other might as well be a number.

/// The filter that formats.
pub(super) const FILTER: &str = "lora_percent";

/// The code of a tag with its formattings as filters; `None` if there are none.
pub(super) fn rewrite(code: &str) -> Option<String> {
    let (mut out, mut copied, mut at) = (String::new(), 0, 0);
    while let Some(found) = code[at..].find(['\'', '"']) {
        let start = at + found;
        let Some(end) = string(code, start) else { break };
        at = end;
        let sign = blanks(code, end);
        let operand = code[sign..].starts_with('%').then(|| operand(code, sign + 1)).flatten();
        if let Some(after) = operand {
            let value = &code[sign + 1..after];
            let value = rewrite(value).unwrap_or_else(|| value.to_owned());
            out.push_str(&format!("{}({}|{FILTER}({}))", &code[copied..start], &code[start..end], value.trim()));
            (copied, at) = (after, after);
        }
    }
    (copied > 0).then(|| out + &code[copied..])
}

/// Where what follows the sign ends: a value with its fields, calls and filters, which all bind tighter.
fn operand(code: &str, from: usize) -> Option<usize> {
    let mut at = blanks(code, from);
    at += code[at..].len() - code[at..].trim_start_matches('-').len();
    at = match code[at..].chars().next()? {
        '(' | '[' | '{' => brackets(code, at)?,
        '\'' | '"' => string(code, at)?,
        letter if letter.is_alphanumeric() || letter == '_' => name(code, at),
        _ => return None,
    };
    loop {
        let next = blanks(code, at);
        at = match code[next..].chars().next() {
            Some('(' | '[') => brackets(code, next)?,
            Some('.') => name(code, next + 1),
            Some('|') => name(code, blanks(code, next + 1)),
            _ => return Some(at),
        };
    }
}

fn blanks(code: &str, at: usize) -> usize {
    code.len() - code[at..].trim_start().len()
}

fn name(code: &str, at: usize) -> usize {
    let part = |letter: char| letter.is_alphanumeric() || letter == '_';
    code.len() - code[at..].trim_start_matches(part).len()
}

/// The end of the string that begins here.
fn string(code: &str, start: usize) -> Option<usize> {
    let mut letters = code[start..].char_indices();
    let (_, quote) = letters.next()?;
    let mut escaped = false;
    for (at, letter) in letters {
        if !escaped && letter == quote {
            return Some(start + at + letter.len_utf8());
        }
        escaped = !escaped && letter == '\\';
    }
    None
}

/// The end of the brackets that begin here.
fn brackets(code: &str, start: usize) -> Option<usize> {
    let (mut depth, mut at) = (0usize, start);
    while let Some(letter) = code[at..].chars().next() {
        match letter {
            '\'' | '"' => {
                at = string(code, at)?;
                continue;
            }
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.checked_sub(1)?,
            _ => {}
        }
        at += letter.len_utf8();
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(code: &str, expected: &str) {
        assert_eq!(rewrite(code).as_deref().unwrap_or(code), expected);
    }

    #[test]
    fn the_operand_ends_where_pythons_does() {
        check(" 'a%s' % x + y ", " ('a%s'|lora_percent(x)) + y ");
        check("'%s' % x.y[0](z)|upper ~ w", "('%s'|lora_percent(x.y[0](z)|upper)) ~ w");
        check("'%d-%s' % (1, ')') if a", "('%d-%s'|lora_percent((1, ')'))) if a");
        check("'%s' % ('%d' % 3)", "('%s'|lora_percent((('%d'|lora_percent(3)))))");
        check("\"%s\"%-1", "(\"%s\"|lora_percent(-1))");
    }

    #[test]
    fn remainders_are_left_alone() {
        for same in ["loop.index0 % 2 == 0", "x['a'] % 2", "f('a') % 2", "'100 %' ~ x", "'a' %", "'"] {
            check(same, same);
        }
    }
}

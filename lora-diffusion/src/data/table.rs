//! `metadata.jsonl` and `metadata.csv`: captions in one table, as Hugging Face's `ImageFolder` has them.
//!
//! A row names a picture in `file_name`, relative to the table, and its caption in `text`; tables of other tools say
//! `caption` or `prompt`. Rows that are of no use are returned with the reason, by line.

use std::collections::HashMap;

/// Captions by file name, and the lines that gave none.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// File name as written, with the line and the caption.
    pub rows: Vec<(usize, String, Option<String>)>,
    /// Line and reason.
    pub bad: Vec<(usize, String)>,
}

const FILE: &str = "file_name";
const TEXT: [&str; 3] = ["text", "caption", "prompt"];

/// Reads JSON lines.
pub(super) fn jsonl(text: &str) -> Table {
    let mut table = Table::default();
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        let row: HashMap<String, serde_json::Value> = match serde_json::from_str(line) {
            Ok(row) => row,
            Err(error) => {
                table.bad.push((number, format!("not a JSON object: {error}")));
                continue;
            }
        };
        let field = |name: &str| row.get(name).and_then(|value| value.as_str()).map(str::to_owned);
        let mut columns: Vec<&str> = row.keys().map(String::as_str).collect();
        columns.sort_unstable();
        table.add(number, field(FILE), TEXT.into_iter().find_map(field), &columns);
    }
    table
}

/// Reads comma-separated values with a header (RFC 4180: quotes around a field, doubled inside it).
pub(super) fn csv(text: &str) -> Table {
    let mut table = Table::default();
    let mut records = records(text).into_iter();
    let Some((_, header)) = records.next() else { return table };
    let header: Vec<&str> = header.iter().map(|name| name.trim()).collect();
    for (number, record) in records {
        let field = |name: &str| {
            let column = header.iter().position(|column| *column == name)?;
            record.get(column).cloned()
        };
        table.add(number, field(FILE), TEXT.into_iter().find_map(field), &header);
    }
    table
}

impl Table {
    fn add(&mut self, number: usize, file: Option<String>, text: Option<String>, columns: &[&str]) {
        match file {
            Some(file) => self.rows.push((number, file, text)),
            None => self.bad.push((number, format!("no `{FILE}` among {}", columns.join(", ")))),
        }
    }
}

/// Records with the line that each begins on.
fn records(text: &str) -> Vec<(usize, Vec<String>)> {
    let (mut records, mut record, mut field) = (Vec::new(), Vec::new(), String::new());
    let (mut quoted, mut line, mut start) = (false, 1, 1);
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        line += usize::from(letter == '\n');
        match letter {
            '"' if quoted && letters.peek() == Some(&'"') => field.extend(letters.next()),
            '"' => quoted = !quoted,
            ',' if !quoted => record.push(std::mem::take(&mut field)),
            '\r' if !quoted => {}
            '\n' if !quoted => {
                record.push(std::mem::take(&mut field));
                let record = std::mem::take(&mut record);
                if record.len() > 1 || !record[0].trim().is_empty() {
                    records.push((start, record));
                }
                start = line;
            }
            letter => field.push(letter),
        }
    }
    if !(field.is_empty() && record.is_empty()) {
        record.push(field);
        records.push((start, record));
    }
    records
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_lines_give_captions_and_name_what_is_wrong() {
        let table = jsonl(concat!(
            r#"{"file_name": "a.png", "text": "a cat"}"#,
            "\r\n\r\n",
            r#"{"file_name": "b.png", "caption": "a dog"}"#,
            "\n",
            r#"{"file": "c.png", "text": "x"}"#,
            "\n{half\n",
            r#"{"file_name": "d.png"}"#
        ));
        let rows: Vec<_> = table.rows.iter().map(|(line, file, text)| (*line, &**file, text.as_deref())).collect();
        assert_eq!(rows, [(1, "a.png", Some("a cat")), (3, "b.png", Some("a dog")), (6, "d.png", None)]);
        assert_eq!(table.bad.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [4, 5]);
        assert_eq!(table.bad[0].1, "no `file_name` among file, text");
    }

    #[test]
    fn quoted_fields_may_hold_commas_quotes_and_lines() {
        let table = csv("file_name,text\na.png,\"a \"\"big\"\", red\ncat\"\nb.png,plain\n");
        assert_eq!(table.rows[0], (2, "a.png".into(), Some("a \"big\", red\ncat".into())));
        assert_eq!(table.rows[1], (4, "b.png".into(), Some("plain".into())));
    }
}

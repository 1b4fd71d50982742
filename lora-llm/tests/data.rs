//! Files of texts: every format, every packing, and sixteen ways for a file to be wrong.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, io::Write, path::PathBuf};

use lora_llm::{
    chat::ChatTemplate,
    data::{Dataset, Error, Format, LoadOptions, OnBad, OnLong, Preview, Result, TrainOn},
    tokenizer::Tokenizer,
};

struct Model {
    tokenizer: Tokenizer,
    template: ChatTemplate,
}

fn model() -> Model {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../assets/tiny-llm");
    let tokenizer = Tokenizer::open(&folder).unwrap();
    let template = ChatTemplate::open(&folder, None, &tokenizer).unwrap();
    Model { tokenizer, template }
}

fn load_as(name: &str, bytes: &[u8], options: &LoadOptions) -> Result<Dataset> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    let model = model();
    Dataset::load(&path, &model.tokenizer, Some(&model.template), options)
}

fn load(bytes: &[u8], on_bad: OnBad) -> Result<Dataset> {
    load_as("rows.jsonl", bytes, &LoadOptions { on_bad, ..LoadOptions::new(512) })
}

/// Examples as text, what is trained in brackets.
fn shown(dataset: &Dataset) -> Vec<String> {
    let tokenizer = model().tokenizer;
    dataset.train.iter().map(|example| Preview::new(example, &tokenizer).unwrap().to_string()).collect()
}

const GOOD: &str = r#"{"prompt": "Question: Who?\nAnswer:", "completion": " Nora"}"#;
const SHOWN: &str = "<|begin|>Question: Who?\nAnswer:⟦ Nora<|end|>⟧";

#[track_caller]
fn check_format(row: &str, format: Format, expected: &str) {
    let dataset = load(row.as_bytes(), OnBad::Stop).unwrap();
    assert_eq!((dataset.format, &*shown(&dataset)), (format, &[expected.to_owned()][..]));
}

#[test]
fn five_formats_are_told_apart() {
    const CHAT: &str = "<|begin|><|user|>\nHi!<|end|><|assistant|>\n⟦Hello!<|end|>⟧";
    check_format(GOOD, Format::PromptCompletion, SHOWN);
    check_format(
        r#"{"messages": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello!"}]}"#,
        Format::Messages,
        CHAT,
    );
    check_format(
        r#"{"conversations": [{"from": "human", "value": "Hi!"}, {"from": "gpt", "value": "Hello!"}]}"#,
        Format::ShareGpt,
        CHAT,
    );
    check_format(
        r#"{"prompt": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Hi!"}], "completion": [{"role": "assistant", "content": "Hello!"}]}"#,
        Format::PromptCompletion,
        "<|begin|><|user|>\nHi!<|end|><|assistant|>\nYes?<|end|><|user|>\nHi!<|end|><|assistant|>\n⟦Hello!<|end|>⟧",
    );
    check_format(
        r#"{"instruction": "Greet.", "input": "Nora", "output": "Hello!"}"#,
        Format::Alpaca,
        "<|begin|><|user|>\nGreet.\nNora<|end|><|assistant|>\n⟦Hello!<|end|>⟧",
    );
    check_format(
        r#"{"instruction": "Greet.", "input": "", "output": "Hello!"}"#,
        Format::Alpaca,
        "<|begin|><|user|>\nGreet.<|end|><|assistant|>\n⟦Hello!<|end|>⟧",
    );
    check_format(r#"{"text": "Once upon a time."}"#, Format::Text, "<|begin|>⟦Once upon a time.<|end|>⟧");
    check_format(
        r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]}, {"role": "assistant", "content": "Hello!"}]}"#,
        Format::Messages,
        CHAT,
    );
}

#[test]
fn alpaca_without_a_template_uses_stanfords_prompt() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    fs::write(&path, r#"{"instruction": "Greet.", "output": "Hello!"}"#).unwrap();
    let dataset = Dataset::load(&path, &model().tokenizer, None, &LoadOptions::new(512)).unwrap();
    assert!(shown(&dataset)[0].ends_with("### Instruction:\nGreet.\n\n### Response:\n⟦Hello!<|end|>⟧"));
}

#[test]
fn all_of_a_conversation_can_be_trained() {
    let row = r#"{"messages": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello!"}]}"#;
    let options = LoadOptions { train_on: TrainOn::All, ..LoadOptions::new(512) };
    let dataset = load_as("rows.jsonl", row.as_bytes(), &options).unwrap();
    assert_eq!(shown(&dataset), ["<|begin|>⟦<|user|>\nHi!<|end|><|assistant|>\nHello!<|end|>⟧"]);
}

#[test]
fn packed_files_are_told_by_their_bytes() {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(GOOD.as_bytes()).unwrap();
    let gzip = gzip.finish().unwrap();
    let zstd = ruzstd::encoding::compress_to_vec(GOOD.as_bytes(), ruzstd::encoding::CompressionLevel::Fastest);
    for (packed, name) in [(&gzip, "gzip"), (&zstd, "zstd")] {
        let dataset = load(packed, OnBad::Stop).unwrap();
        assert_eq!(shown(&dataset), [SHOWN]);
        assert_eq!(dataset.layout, format!("one JSON object per line, packed with {name}"));
        let half = load(&packed[..packed.len() / 2], OnBad::Skip).unwrap_err();
        assert!(matches!(half, Error::Read { .. }), "{half}");
    }
}

#[test]
fn a_text_file_is_one_text_in_pieces() {
    let text = "Once upon a time, there was a dog. ".repeat(30);
    let options = LoadOptions::new(64);
    let dataset = load_as("story.txt", text.as_bytes(), &options).unwrap();
    assert!(dataset.train.len() > 3 && dataset.train.iter().all(|example| example.ids.len() <= 64));
    let whole: Vec<u32> = dataset.train.iter().flat_map(|example| example.ids.clone()).collect();
    let mut expected = model().tokenizer.encode(&text, true).unwrap().ids;
    expected.push(1);
    assert_eq!(whole, expected);
}

#[cfg(feature = "parquet")]
#[test]
fn parquet_files_are_read() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parquet");
    let load = |name: &str, on_bad| {
        let options = LoadOptions { on_bad, ..LoadOptions::new(512) };
        let model = model();
        Dataset::load(&folder.join(name), &model.tokenizer, Some(&model.template), &options)
    };
    let chats = load("chats.parquet", OnBad::Stop).unwrap();
    assert_eq!((chats.format, chats.train.len()), (Format::Messages, 2));
    assert_eq!(shown(&chats)[0], "<|begin|><|user|>\nHi!<|end|><|assistant|>\n⟦Hello é🙂!<|end|>⟧");
    let pairs = load("pairs.parquet", OnBad::Skip).unwrap();
    assert_eq!((pairs.train.len(), pairs.bad[0].line), (2, 3));
}

#[cfg(not(feature = "parquet"))]
#[test]
fn parquet_files_are_refused_with_the_way_out() {
    let error = load(b"PAR1....", OnBad::Skip).unwrap_err();
    assert!(error.hint().unwrap().contains("to_json"), "{error}");
}

// The sixteen faults.

/// `rows` among good ones: with "stop" an error that names the place, with "skip" a note of it, and the good rows used.
#[track_caller]
fn check_fault(bytes: &[u8], good: usize, line: usize, column: usize, reason: &str) {
    let error = load(bytes, OnBad::Stop).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&format!("rows.jsonl:{line}:{column}: ")) && text.contains(reason), "{text}");
    assert!(error.hint().unwrap().contains("--on-bad skip"));
    let dataset = load(bytes, OnBad::Skip).unwrap();
    assert_eq!(dataset.train.len(), good);
    let bad = &dataset.bad[0];
    assert_eq!((bad.line, bad.column), (line, column));
    let report = dataset.report(None);
    assert!(report.to_string().contains(&format!("rows.jsonl:{line}:{column}: ")), "{report}");
}

fn among(row: &str) -> Vec<u8> {
    format!("{GOOD}\n{row}\n{GOOD}\n").into_bytes()
}

#[test]
fn f34_01_a_line_that_is_no_json() {
    check_fault(&among(r#"{"prompt": "a" "completion": "b"}"#), 2, 2, 16, "expected `,` or `}`");
}

#[test]
fn f34_02_a_byte_order_mark_is_left_out_and_said() {
    let dataset = load(format!("\u{feff}{GOOD}").as_bytes(), OnBad::Stop).unwrap();
    assert_eq!(shown(&dataset), [SHOWN]);
    assert!(dataset.notes[0].contains("byte order mark"));
}

#[test]
fn f34_03_dos_line_ends_change_nothing() {
    let dataset = load(format!("{GOOD}\r\n{GOOD}\r\n").as_bytes(), OnBad::Stop).unwrap();
    assert_eq!(shown(&dataset), [SHOWN, SHOWN]);
}

#[test]
fn f34_04_blank_lines_are_no_rows() {
    let dataset = load(format!("\n{GOOD}\n  \n\n{GOOD}\n\n").as_bytes(), OnBad::Stop).unwrap();
    assert_eq!((dataset.rows, dataset.lines.as_slice()), (2, &[2, 5][..]));
}

#[test]
fn f34_05_an_array_is_read_by_elements() {
    let text = format!("[\n {GOOD},\n {{\"prompt\": \"a\",\n  \"completion\": 7 7}},\n {GOOD}\n]\n");
    check_fault(text.as_bytes(), 2, 4, 19, "expected `,` or `}`");
    let dataset = load(format!("[{GOOD}, {GOOD}]").as_bytes(), OnBad::Stop).unwrap();
    assert_eq!((dataset.layout.as_str(), dataset.train.len()), ("a JSON array", 2));
    check_fault(format!("[{GOOD},\n{GOOD}").as_bytes(), 2, 2, GOOD.len() + 1, "not closed");
}

#[test]
fn f34_06_mixed_formats_are_told() {
    check_fault(
        &among(r#"{"text": "a"}"#),
        2,
        2,
        1,
        "in another format (text) than the rows before (prompt and completion)",
    );
    check_fault(
        &among(r#"{"question": "a", "answer": "b"}"#),
        2,
        2,
        1,
        "in no known format, with `question`, `answer`",
    );
}

const CHAT: &str = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;

#[track_caller]
fn check_chat(row: &str, reason: &str) {
    check_fault(format!("{CHAT}\n{row}\n").as_bytes(), 1, 2, 1, reason);
}

#[test]
fn f34_07_unknown_roles_are_named() {
    check_chat(
        r#"{"messages": [{"role": "bot", "content": "a"}]}"#,
        "message 1: `role` is `bot`, expected one of system",
    );
    let row = r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gtp", "value": "b"}]}"#;
    let good = r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#;
    check_fault(format!("{good}\n{row}").as_bytes(), 1, 2, 1, "turn 2: `from` is `gtp`");
}

#[test]
fn f34_08_an_assistant_that_says_nothing() {
    let row = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}"#;
    check_chat(row, "message 2: the assistant says nothing");
    check_fault(&among(r#"{"prompt": "a", "completion": ""}"#), 2, 2, 1, "`completion` is empty");
}

#[test]
fn f34_09_a_line_of_a_megabyte_is_read() {
    let long = format!(r#"{{"prompt": "{}", "completion": "b"}}"#, "a ".repeat(1 << 19));
    let dataset = load(format!("{GOOD}\n{long}\n").as_bytes(), OnBad::Stop).unwrap();
    assert_eq!((dataset.train.len(), dataset.long.rows, dataset.long.dropped), (1, 1, 1));
    assert!(dataset.long.longest > 500_000);
    assert!(dataset.report(None).to_string().contains("too long   1 row, up to"));
}

#[test]
fn f34_10_zero_bytes_are_damage() {
    check_fault(&among("{\"prompt\": \"a\0\", \"completion\": \"b\"}"), 2, 2, 14, "a zero byte");
}

#[test]
fn f34_11_a_last_line_that_breaks_off() {
    check_fault(format!("{GOOD}\n{{\"prompt\": \"a\", \"compl").as_bytes(), 1, 2, 22, "the row breaks off");
}

#[test]
fn f34_12_utf16_is_refused_with_the_way_out() {
    let units: Vec<u8> = GOOD.encode_utf16().flat_map(u16::to_le_bytes).collect();
    for bytes in [[&b"\xff\xfe"[..], &units].concat(), units] {
        let error = load(&bytes, OnBad::Skip).unwrap_err();
        assert!(matches!(error, Error::Utf16 { .. }) && error.hint().unwrap().contains("iconv"), "{error}");
    }
}

#[test]
fn f34_13_bytes_that_are_no_utf8_are_found() {
    let mut bytes = among("{\"prompt\": \"caf?\", \"completion\": \"b\"}");
    let at = bytes.windows(4).position(|window| window == b"caf?").unwrap();
    bytes[at + 3] = 0xe9;
    check_fault(&bytes, 2, 2, 16, "not UTF-8");
}

#[test]
fn f34_14_an_empty_file_is_said_to_be_empty() {
    for empty in ["", "\n\n", "[]"] {
        let error = load(empty.as_bytes(), OnBad::Skip).unwrap_err();
        assert!(error.to_string().ends_with("nothing to train on: the file is empty"), "{error}");
    }
}

#[test]
fn f34_15_fields_of_the_wrong_kind_are_named() {
    check_fault(&among("17"), 2, 2, 1, "a number, expected an object");
    check_fault(&among(r#"{"prompt": 1, "completion": "b"}"#), 2, 2, 1, "`prompt` is a number, expected a text");
    check_chat(r#"{"messages": "hello"}"#, "`messages` is a text, expected a list");
    check_chat(r#"{"messages": [{"role": "user", "content": "a"}]}"#, "no message of the assistant");
    check_chat(r#"{"messages": [{"role": "user"}]}"#, "message 1: `content` is missing");
    check_chat(r#"{"chosen": "a", "rejected": "b"}"#, "preferences are not trained on");
}

#[test]
fn f34_16_another_file_is_called_by_its_name() {
    for (bytes, what) in [
        (&b"<!DOCTYPE html><title>Login</title>"[..], "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"PK\x03\x04....", "a ZIP archive"),
    ] {
        let error = load(bytes, OnBad::Skip).unwrap_err();
        assert!(error.to_string().ends_with(&format!("{what}, not a file of texts")), "{error}");
        assert!(error.hint().is_some());
    }
    let error = load(br#"{"a": 1, "b": 2}"#, OnBad::Skip).unwrap_err();
    assert!(error.to_string().contains("rows with `a`, `b` are in no known format"), "{error}");
    assert!(error.to_string().contains("\n  {\"messages\""), "{error}");
}

// Length, validation, the rest.

fn long_chat() -> Vec<u8> {
    let turn = |role: &str, text: &str| format!(r#"{{"role": "{role}", "content": "{text}"}}"#);
    let exchange = [turn("user", "Once upon a time?"), turn("assistant", "There was a dog in the garden.")].join(", ");
    let turns = [turn("system", "Be kind."), [&*exchange; 6].join(", ")].join(", ");
    format!(r#"{{"messages": [{turns}]}}"#).into_bytes()
}

#[test]
fn long_conversations_are_cut_left_out_or_split_between_turns() {
    let load = |on_long| load_as("rows.jsonl", &long_chat(), &LoadOptions { on_long, ..LoadOptions::new(64) });
    let cut = load(OnLong::Truncate).unwrap();
    assert_eq!((cut.train.len(), cut.train[0].ids.len()), (1, 64));
    assert!(load(OnLong::Drop).unwrap_err().to_string().contains("all 1 rows have too many tokens"));
    let split = load(OnLong::Split).unwrap();
    let texts = shown(&split);
    assert!(texts.len() > 1 && split.train.iter().all(|example| example.ids.len() <= 64));
    for text in &texts {
        assert!(
            text.starts_with("<|begin|><|system|>\nBe kind.<|end|><|user|>\nOnce") && text.ends_with("<|end|>⟧"),
            "{text}"
        );
    }
    let answers: usize = texts.iter().map(|text| text.matches("⟦There was").count()).sum();
    assert_eq!(answers, 6);
}

#[test]
fn validation_is_the_same_whatever_the_order() {
    let row = |number: usize| format!(r#"{{"prompt": "What is {number}?", "completion": " {number}"}}"#);
    let mut rows: Vec<String> = (0..50).map(row).collect();
    let kept = |rows: &[String], seed| {
        let options = LoadOptions { validation: 0.2, seed, ..LoadOptions::new(64) };
        let dataset = load_as("rows.jsonl", rows.join("\n").as_bytes(), &options).unwrap();
        assert_eq!((dataset.train.len(), dataset.lines.len()), (40, 40));
        let mut ids: Vec<Vec<u32>> = dataset.validation.into_iter().map(|example| example.ids).collect();
        ids.sort();
        ids
    };
    let first = kept(&rows, 1);
    rows.reverse();
    assert_eq!(first.len(), 10);
    assert_eq!(kept(&rows, 1), first);
    assert_ne!(kept(&rows, 2), first);
}

#[test]
fn conversations_need_a_template() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    fs::write(&path, CHAT).unwrap();
    let error = Dataset::load(&path, &model().tokenizer, None, &LoadOptions::new(512)).unwrap_err();
    assert!(matches!(error, Error::NoTemplate { format: Format::Messages, .. }) && error.hint().is_some());
}

#[test]
fn the_report_says_what_counts() {
    let rows = format!("{GOOD}\n{GOOD}\nnonsense\n");
    let report = load(rows.as_bytes(), OnBad::Skip).unwrap().report(None);
    assert_eq!((report.rows, report.examples, report.bad.len()), (3, 2, 1));
    assert_eq!((report.tokens.trained, report.tokens.total % 2), (2 * 2, 0));
    assert!(report.to_string().contains("skipped: 1 row\n"), "{report}");
}

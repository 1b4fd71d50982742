//! Files of texts, chat templates and models with a fault, as a person meets them through `lora data check` and `lora train`:
//! file, line and column, what was seen and what is expected, and a hint whose command works when it is pasted.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

mod support;

use std::{
    fs,
    process::Output,
    time::{Duration, Instant},
};

use support::{Place, assets, said};

const SHORT: &str = "--steps 1 --batch 1 --rank 2 --sample-every 0 --device cpu --out run";
const GOOD: &str = r#"{"prompt": "Question: Who?\nAnswer:", "completion": " Nora"}"#;
const CHAT: &str = r#"{"messages": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello!"}]}"#;

/// What a person reads of a failure: exit code 1, one error of few lines with a hint, no run left behind.
#[track_caller]
fn refused(place: &Place, words: &str, parts: &[&str]) -> String {
    let output = place.engine(words).output().unwrap();
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{words}: {}", said(&output));
    assert!(text.starts_with("error: ") && text.contains("\nhint: "), "{words}: {text}");
    assert!(text.lines().count() <= 12, "{words}: {text}");
    assert!(!text.contains("\\n") && !text.contains("\\u"), "{words}: an escape instead of a line: {text}");
    for part in parts {
        assert!(text.contains(part), "{words}: `{part}` is missing in {text}");
    }
    assert!(!place.path("run").exists(), "{words}: a run was left");
    text
}

/// The commands of a hint, run as they stand; `lora` is the engine here.
#[track_caller]
fn pasted(place: &Place, text: &str) -> Vec<Output> {
    let hint = text.split("\nhint: ").nth(1).unwrap_or_else(|| panic!("no hint in {text}"));
    let commands = hint.split('`').filter_map(|part| part.strip_prefix("lora "));
    let run = |words: &str| {
        let output = place.engine(words).output().unwrap();
        assert_ne!(output.status.code(), Some(2), "`lora {words}` is no command: {}", said(&output));
        output
    };
    commands.map(run).collect()
}

/// A file with one fault at `at`, which is `LINE:COLUMN`, and `good` rows: training stops there and names it, `data check`
/// lists it, and both are told how to go on without it.
#[track_caller]
fn check_fault(place: &Place, bytes: &[u8], good: usize, at: &str, parts: &[&str]) {
    fs::write(place.path("rows.jsonl"), bytes).unwrap();
    let place_of_fault = format!("rows.jsonl:{at}: ");
    let parts: Vec<&str> = [&*place_of_fault].iter().chain(parts).copied().collect();
    for more in [" --dry-run", ""] {
        let text = refused(place, &format!("train rows.jsonl --base MODEL {SHORT}{more}"), &parts);
        assert!(text.starts_with(&format!("error: {place_of_fault}")), "{text}");
        let listed = pasted(place, &text);
        assert_eq!(listed.len(), 1, "{text}");
        assert!(said(&listed[0]).contains(&place_of_fault), "{}", said(&listed[0]));
    }
    let output = place.engine("data check rows.jsonl --base MODEL").output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    for part in parts {
        assert!(said(&output).contains(part), "`{part}` is missing in {}", said(&output));
    }
    let skipped = place.engine("data check rows.jsonl --base MODEL --on-bad skip --json").output().unwrap();
    match good {
        0 => assert_eq!(skipped.status.code(), Some(1)),
        good => {
            let report: serde_json::Value = serde_json::from_slice(&skipped.stdout).unwrap();
            assert_eq!((&report["examples"], &report["bad"][0]["line"]), (&good.into(), &line(at).into()));
        }
    }
}

fn line(at: &str) -> u64 {
    at.split(':').next().unwrap().parse().unwrap()
}

/// A file that is read as it is: rows, and what is said about it.
#[track_caller]
fn check_read(bytes: &[u8], rows: u64, parts: &[&str]) {
    let place = Place::new(0);
    fs::write(place.path("rows.jsonl"), bytes).unwrap();
    let checked = place.engine("data check rows.jsonl --base MODEL").output().unwrap();
    assert!(checked.status.success(), "{}", said(&checked));
    for part in parts {
        assert!(said(&checked).contains(part), "`{part}` is missing in {}", said(&checked));
    }
    let planned = place.engine(&format!("train rows.jsonl --base MODEL {SHORT} --dry-run --json")).output().unwrap();
    let plan: serde_json::Value = serde_json::from_slice(&planned.stdout).unwrap();
    assert_eq!(plan["data"]["used"].as_u64(), Some(rows), "{plan}");
}

fn among(row: &str) -> Vec<u8> {
    format!("{GOOD}\n{row}\n{GOOD}\n").into_bytes()
}

#[test]
fn f34_01_a_line_that_is_no_json() {
    let row = r#"{"prompt": "a" "completion": "b"}"#;
    check_fault(&Place::new(0), &among(row), 2, "2:16", &["expected `,` or `}`", row]);
}

#[test]
fn f34_02_a_byte_order_mark_is_left_out_and_said() {
    check_read(format!("\u{feff}{GOOD}\n").as_bytes(), 1, &["byte order mark"]);
}

#[test]
fn f34_03_dos_line_ends_change_nothing() {
    check_read(format!("{GOOD}\r\n{GOOD}\r\n").as_bytes(), 2, &["2 rows", "prompt and completion"]);
}

#[test]
fn f34_04_blank_lines_are_no_rows() {
    check_read(format!("\n{GOOD}\n  \n\n{GOOD}\n\n").as_bytes(), 2, &["2 rows"]);
}

#[test]
fn f34_05_an_array_is_read_by_elements_and_its_faults_have_places() {
    check_read(format!("[\n{GOOD},\n{GOOD}\n]\n").as_bytes(), 2, &["a JSON array"]);
    let text = format!("[\n {GOOD},\n {{\"prompt\": \"a\",\n  \"completion\": 7 7}},\n {GOOD}\n]\n");
    check_fault(&Place::new(0), text.as_bytes(), 2, "4:19", &["expected `,` or `}`"]);
}

#[test]
fn f34_06_mixed_formats_are_told() {
    let place = Place::new(0);
    check_fault(&place, &among(r#"{"text": "a"}"#), 2, "2:1", &["another format (text)", "prompt and completion"]);
    check_fault(&place, &among(r#"{"question": "a"}"#), 2, "2:1", &["no known format, with `question`"]);
}

#[test]
fn f34_07_unknown_roles_are_named_with_the_known_ones() {
    let row = r#"{"messages": [{"role": "bot", "content": "a"}]}"#;
    let bytes = format!("{CHAT}\n{row}\n");
    check_fault(&Place::new(0), bytes.as_bytes(), 1, "2:1", &["message 1: `role` is `bot`", "user, assistant"]);
}

#[test]
fn f34_08_an_assistant_that_says_nothing() {
    let row = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}"#;
    let bytes = format!("{CHAT}\n{row}\n");
    check_fault(&Place::new(0), bytes.as_bytes(), 1, "2:1", &["message 2: the assistant says nothing"]);
}

#[test]
fn f34_09_a_line_of_a_megabyte_is_read_and_its_length_said() {
    let long = format!(r#"{{"prompt": "{}", "completion": "b"}}"#, "a ".repeat(1 << 19));
    check_read(format!("{GOOD}\n{long}\n").as_bytes(), 1, &["too long   1 row, up to", "left out (--on-long)"]);
}

#[test]
fn f34_10_zero_bytes_are_damage() {
    let row = "{\"prompt\": \"a\0\", \"completion\": \"b\"}";
    check_fault(&Place::new(0), &among(row), 2, "2:14", &["a zero byte"]);
}

#[test]
fn f34_11_a_last_line_that_breaks_off() {
    let bytes = format!("{GOOD}\n{{\"prompt\": \"a\", \"compl");
    check_fault(&Place::new(0), bytes.as_bytes(), 1, "2:22", &["the row breaks off", "\"compl"]);
}

#[test]
fn f34_12_utf16_is_refused_with_the_way_out() {
    let place = Place::new(0);
    let units: Vec<u8> = GOOD.encode_utf16().flat_map(u16::to_le_bytes).collect();
    fs::write(place.path("rows.jsonl"), [&b"\xff\xfe"[..], &units].concat()).unwrap();
    for words in [format!("train rows.jsonl --base MODEL {SHORT}"), "data check rows.jsonl --base MODEL".to_owned()] {
        let parts =
            ["rows.jsonl: encoded as UTF-16, expected UTF-8", "`iconv -f UTF-16 -t UTF-8 rows.jsonl > utf8.jsonl`"];
        refused(&place, &words, &parts);
    }
}

#[test]
fn f34_13_bytes_that_are_no_utf8_are_found() {
    let mut bytes = among("{\"prompt\": \"caf?\", \"completion\": \"b\"}");
    let at = bytes.windows(4).position(|window| window == b"caf?").unwrap();
    bytes[at + 3] = 0xe9;
    check_fault(&Place::new(0), &bytes, 2, "2:16", &["not UTF-8"]);
}

#[test]
fn f34_14_an_empty_file_is_said_to_be_empty() {
    let place = Place::new(0);
    for empty in ["", "\n\n", "[]"] {
        fs::write(place.path("rows.jsonl"), empty).unwrap();
        for words in [format!("train rows.jsonl --base MODEL {SHORT}"), "data check rows.jsonl --base MODEL".to_owned()]
        {
            pasted(&place, &refused(&place, &words, &["rows.jsonl: nothing to train on: the file is empty"]));
        }
    }
}

#[test]
fn f34_15_fields_of_the_wrong_kind_are_named() {
    let place = Place::new(0);
    check_fault(&place, &among("17"), 2, "2:1", &["a number, expected an object"]);
    check_fault(
        &place,
        &among(r#"{"prompt": 1, "completion": "b"}"#),
        2,
        "2:1",
        &["`prompt` is a number, expected a text"],
    );
}

#[test]
fn f34_16_another_file_is_called_by_its_name() {
    let place = Place::new(0);
    for (bytes, what) in [
        (&b"<!DOCTYPE html><title>Login</title>"[..], "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"PK\x03\x04....", "a ZIP archive"),
    ] {
        fs::write(place.path("rows.jsonl"), bytes).unwrap();
        for words in [format!("train rows.jsonl --base MODEL {SHORT}"), "data check rows.jsonl --base MODEL".to_owned()]
        {
            refused(&place, &words, &[&format!("rows.jsonl: {what}, not a file of texts")]);
        }
    }
    // Rows of nobody's format: the formats there are, each on a line.
    fs::write(place.path("rows.jsonl"), r#"{"question": "a", "answer": "b"}"#).unwrap();
    let parts = ["rows.jsonl:1:1: rows with `question`, `answer`", "\n  {\"prompt\": ", "\n  {\"text\": "];
    pasted(&place, &refused(&place, &format!("train rows.jsonl --base MODEL {SHORT}"), &parts));
}

#[test]
fn all_rows_that_cannot_be_used_are_listed_at_once() {
    let place = Place::new(0);
    place.texts("rows.jsonl", &[GOOD, "17", GOOD, "nonsense"]);
    let output = place.engine("data check rows.jsonl --base MODEL").output().unwrap();
    let text = said(&output);
    assert!(text.contains("rows.jsonl:2:1: a number") && text.contains("rows.jsonl:4:2: "), "{text}");
    assert!(text.contains("error: rows.jsonl: 2 of 4 rows cannot be used, so training stops there"), "{text}");
    // The hint trains on the others: pasted, with less to do.
    let command = text.split('`').find(|part| part.starts_with("lora train")).unwrap();
    let words = format!("{} {SHORT} --dry-run", command.strip_prefix("lora ").unwrap());
    let planned = place.engine(&words).output().unwrap();
    assert!(planned.status.success(), "{words}: {}", said(&planned));
}

// Chat templates.

/// A template with a fault at its line 2: named within a second or so, with the line itself.
#[track_caller]
fn check_template(template: &str, parts: &[&str]) {
    let place = Place::new(0);
    place.texts("chats.jsonl", &[CHAT]);
    fs::write(place.path("own.jinja"), template).unwrap();
    for words in [
        format!("train chats.jsonl --base MODEL --chat-template own.jinja {SHORT} --dry-run"),
        format!("train chats.jsonl --base MODEL --chat-template own.jinja {SHORT}"),
        "data check chats.jsonl --base MODEL --chat-template own.jinja".to_owned(),
    ] {
        let started = Instant::now();
        let text = refused(&place, &words, parts);
        assert!(text.contains("own.jinja:2: ") && text.contains("--chat-template FILE.jinja"), "{text}");
        let excerpt = template.lines().nth(1).unwrap();
        assert!(text.contains(&format!("\n  {excerpt}\n")), "the line is missing: {text}");
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    }
}

#[test]
fn f35_01_conversations_need_a_template() {
    let place = Place::new(0);
    place.texts("chats.jsonl", &[CHAT]);
    copy_model(&place, &["chat_template.jinja"]);
    let config = fs::read_to_string(place.path("model/tokenizer_config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config.as_object_mut().unwrap().remove("chat_template");
    fs::write(place.path("model/tokenizer_config.json"), config.to_string()).unwrap();
    for words in [format!("train chats.jsonl --base model {SHORT}"), "data check chats.jsonl --base model".to_owned()] {
        refused(&place, &words, &["chats.jsonl: conversations (`messages`)", "no chat template", "--chat-template"]);
    }
}

#[test]
fn f35_02_an_endless_template_is_stopped() {
    let template = "{# counts #}\n{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}";
    check_template(template, &["too much work and was stopped"]);
}

#[test]
fn f35_03_an_unknown_filter_is_named() {
    check_template("{# a filter #}\n{{ messages[0].content | shout }}", &["shout"]);
}

#[test]
fn f35_04_an_unknown_tag_is_named() {
    check_template("{# a tag #}\n{% repeat 3 %}{% endrepeat %}", &["repeat"]);
}

// Models and what does not belong to them.

/// A copy of the bundled model as `model`, without some files.
fn copy_model(place: &Place, without: &[&str]) {
    let folder = place.path("model");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir(&folder).unwrap();
    for entry in fs::read_dir(assets().join("tiny-llm")).unwrap().flatten() {
        if !without.iter().any(|name| entry.file_name() == *name) {
            fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
        }
    }
}

#[test]
fn a_tokenizer_that_is_missing_broken_or_another_models_is_named() {
    let place = Place::new(0);
    place.texts("rows.jsonl", &[GOOD]);
    let all = |parts: &[&str]| {
        for words in [
            format!("train rows.jsonl --base model {SHORT} --dry-run"),
            "data check rows.jsonl --base model".to_owned(),
            "generate Hello --base model --device cpu".to_owned(),
        ] {
            refused(&place, &words, parts);
        }
    };
    copy_model(&place, &["tokenizer.json"]);
    all(&["model: no `tokenizer.json`", "config.json, tokenizer.json and the weights"]);
    fs::write(place.path("model/tokenizer.model"), "x").unwrap();
    all(&["no `tokenizer.json`, only `tokenizer.model`", "save_pretrained"]);
    fs::write(place.path("model/tokenizer.json"), "<html>").unwrap();
    all(&["model/tokenizer.json: not a tokenizer", "fetch the file again"]);
    copy_model(&place, &[]);
    let config = fs::read_to_string(place.path("model/config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["vocab_size"] = 64.into();
    fs::write(place.path("model/config.json"), config.to_string()).unwrap();
    all(&["model/tokenizer.json", "the model has embeddings for 64", "belongs to another model"]);
}

#[test]
fn an_adapter_for_another_model_is_refused_and_both_are_named() {
    let place = Place::new(0);
    place.texts("rows.jsonl", &[GOOD]);
    let trained = place
        .engine(&format!("train rows.jsonl --base MODEL {SHORT}").replace("--out run", "--out mine"))
        .output()
        .unwrap();
    assert!(trained.status.success(), "{}", said(&trained));
    let text = refused(&place, "generate Hello --base BASE --lora mine --device cpu", &["mine", "0 of "]);
    assert!(text.contains("Stable Diffusion"), "{text}");
}

#[test]
fn a_prompt_that_is_too_long_says_how_long_it_may_be() {
    let place = Place::new(0);
    let long = "word ".repeat(3000).trim_end().replace(' ', "_");
    let text =
        refused(&place, &format!("generate {long} --base MODEL --device cpu"), &["tokens", "at most", "shorten"]);
    assert!(text.len() < 1000, "the prompt itself floods the screen: {text}");
    // Rows that are too long for the model are no fault, and said.
    place.texts("rows.jsonl", &[GOOD, &format!(r#"{{"prompt": "{long}", "completion": "b"}}"#)]);
    let output = place.engine("data check rows.jsonl --base MODEL --on-long drop").output().unwrap();
    assert!(output.status.success() && said(&output).contains("too long   1 row"), "{}", said(&output));
}

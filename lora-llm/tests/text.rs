//! Token ids and loss masks against `transformers` (`fixtures/text/make.py`), and text that comes id by id.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, path::PathBuf};

use lora_llm::{
    chat::ChatTemplate,
    data::{Dataset, LoadOptions, Preview},
    question::Question,
    tokenizer::{Error, Tokenizer},
};
use serde_json::Value;

fn model() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../assets/tiny-llm")
}

fn expected() -> Value {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/text/expected.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn ids_are_those_of_transformers() {
    let tokenizer = Tokenizer::open(&model()).unwrap();
    for case in expected()["texts"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let encoded = tokenizer.encode(text, false).unwrap();
        assert_eq!(encoded.ids, ids(&case["plain"]));
        assert_eq!(tokenizer.encode(text, true).unwrap().ids, ids(&case["framed"]));
        assert_eq!(tokenizer.decode(&encoded.ids, true).unwrap(), text);
        // Every byte belongs to a token, blanks included.
        assert_eq!(encoded.spans.iter().map(|span| span.end).max().unwrap_or(0), text.len());
    }
}

#[test]
fn special_tokens_come_from_the_folder() {
    let tokenizer = Tokenizer::open(&model()).unwrap();
    let special = tokenizer.special();
    assert_eq!((special.begin, special.end, special.pad, &*special.ends), (Some(0), Some(1), Some(5), &[1][..]));
    assert_eq!(special.named["bos_token"], "<|begin|>");
    assert_eq!(tokenizer.rows(), 2048);
    tokenizer.check_rows(2048).unwrap();
    assert!(matches!(tokenizer.check_rows(2000), Err(Error::WrongModel { tokens: 2048, rows: 2000, .. })));
}

#[test]
fn several_ends_and_an_overruled_frame_are_read() {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(model().join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": [1, 3, 999999]}"#).unwrap();
    let config = r#"{"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>", "add_bos_token": false, "add_eos_token": true}"#;
    fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    let tokenizer = Tokenizer::open(folder.path()).unwrap();
    assert_eq!(tokenizer.special().ends, [1, 3]);
    assert_eq!(tokenizer.encode("Hello", true).unwrap().ids, [1309, 1]);
    assert_eq!(tokenizer.encode("Hello", false).unwrap().ids, [1309]);
}

#[test]
fn a_missing_or_broken_tokenizer_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = Tokenizer::open(folder.path()).unwrap_err();
    assert!(error.to_string().ends_with("no `tokenizer.json`") && error.hint().is_some(), "{error}");
    fs::write(folder.path().join("tokenizer.model"), "x").unwrap();
    let error = Tokenizer::open(folder.path()).unwrap_err();
    assert!(
        error.to_string().ends_with("only `tokenizer.model`") && error.hint().unwrap().contains("save_pretrained"),
        "{error}"
    );
    for broken in ["", "<!doctype html>", "{}", "{\"model\": {\"type\": \"Nonsense\"}}"] {
        fs::write(folder.path().join("tokenizer.json"), broken).unwrap();
        let error = Tokenizer::open(folder.path()).unwrap_err();
        assert!(matches!(error, Error::Broken { .. }), "{error}");
    }
}

#[test]
fn text_comes_whole_letter_by_whole_letter() {
    let tokenizer = Tokenizer::open(&model()).unwrap();
    let text = "Hello é 東京 🙂🙂, two  spaces\n";
    let ids = tokenizer.encode(text, true).unwrap().ids;
    let mut stream = tokenizer.stream(false);
    let mut out = String::new();
    let mut silent = 0;
    for id in ids {
        let part = stream.push(id).unwrap();
        assert!(!part.contains('\u{fffd}'), "{part:?}");
        silent += usize::from(part.is_empty());
        out.push_str(&part);
    }
    assert!(silent > 4, "letters of several tokens wait for their last");
    out.push_str(&stream.finish().unwrap());
    assert_eq!(out, text);
}

#[test]
fn half_a_letter_comes_out_at_the_end_as_a_question_mark() {
    let tokenizer = Tokenizer::open(&model()).unwrap();
    let ids = tokenizer.encode("a🙂", false).unwrap().ids;
    let mut stream = tokenizer.stream(true);
    let parts: Vec<String> = ids[..ids.len() - 1].iter().map(|id| stream.push(*id).unwrap()).collect();
    assert_eq!(parts.concat(), "a");
    assert_eq!(stream.finish().unwrap(), "\u{fffd}");
}

/// Writes rows as JSON lines and loads them.
fn load(cases: &Value) -> Dataset {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    let lines: Vec<String> = cases.as_array().unwrap().iter().map(|case| case["row"].to_string()).collect();
    fs::write(&path, lines.join("\n")).unwrap();
    let tokenizer = Tokenizer::open(&model()).unwrap();
    let template = ChatTemplate::open(&model(), None, &tokenizer).unwrap();
    Dataset::load(&path, &tokenizer, Some(&template), &LoadOptions::new(512)).unwrap()
}

#[test]
fn what_is_trained_is_what_the_peer_trains() {
    for kind in ["completions", "chats"] {
        let cases = &expected()[kind];
        let dataset = load(cases);
        assert_eq!(dataset.train.len(), cases.as_array().unwrap().len());
        for (example, case) in dataset.train.iter().zip(cases.as_array().unwrap()) {
            assert_eq!(example.ids, ids(&case["ids"]));
            let trained: Vec<Value> = example.trained.iter().map(|trained| Value::from(*trained)).collect();
            assert_eq!(Value::from(trained), case["trained"], "{}", case["row"]);
        }
    }
}

#[test]
fn the_preview_shows_every_token_and_what_is_trained() {
    let cases = expected()["chats"].clone();
    let tokenizer = Tokenizer::open(&model()).unwrap();
    for (example, case) in load(&cases).train.iter().zip(cases.as_array().unwrap()) {
        let preview = Preview::new(example, &tokenizer).unwrap();
        let text: String = preview.pieces.iter().map(|piece| &*piece.text).collect();
        assert_eq!(text, case["text"]);
        assert_eq!(preview.pieces.iter().map(|piece| piece.tokens).sum::<usize>(), example.ids.len());
        let last = preview.pieces.last().unwrap();
        assert!(last.trained && last.text.ends_with("<|end|>"));
        assert!(preview.to_string().ends_with("<|end|>⟧"));
    }
}

#[test]
fn an_example_is_a_question_with_an_answer() {
    let tokenizer = Tokenizer::open(&model()).unwrap();
    let expected = expected();
    // The last two end their prompts within a token.
    let cases = expected["completions"].as_array().unwrap();
    for (example, case) in load(&expected["completions"]).train.iter().zip(&cases[..8]) {
        let question = Question::of(example, &tokenizer).unwrap().unwrap();
        let (prompt, answer) = (case["row"]["prompt"].as_str().unwrap(), case["row"]["completion"].as_str().unwrap());
        assert!(question.is_answered_by(answer.trim()) && !question.is_answered_by("nobody"));
        assert!(tokenizer.decode(&question.prompt, false).unwrap().starts_with(prompt.trim_end()));
        assert_eq!(question.prompt.len() + question.tokens, example.ids.len());
    }
    let chats = load(&expected["chats"]);
    let last = Question::of(chats.train.last().unwrap(), &tokenizer).unwrap().unwrap();
    assert_eq!(last.answer, "Hi!");
    assert!(tokenizer.decode(&last.prompt, true).unwrap().ends_with("<|assistant|>\n"));
}

#[test]
fn blanks_belong_to_tokens_whatever_the_tokenizer_trims() {
    let folder = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(model().join("tokenizer.json")).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    json["post_processor"] =
        serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    let tokenizer = Tokenizer::open(folder.path()).unwrap();
    let spans = tokenizer.encode("  two  spaces\n and more ", false).unwrap().spans;
    assert!(spans.len() > 5 && spans[0].start == 0 && spans.last().unwrap().end == 24);
    assert!(spans.windows(2).all(|pair| pair[0].end == pair[1].start && !pair[0].is_empty()), "{spans:?}");
}

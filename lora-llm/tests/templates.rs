//! Chat templates against `transformers`: text by text, and the parts that the assistant wrote.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use lora_llm::chat::{ChatTemplate, Conversation, Error, Message, Rendered, message};
use serde_json::{Value, json};

/// The folder with templates, conversations and what `make.py` made of them.
fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/templates")
}

fn template(source: &str) -> Result<ChatTemplate, Error> {
    let special = [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"), ("pad_token", "<pad>")];
    let special = special.map(|(name, token)| (name.to_owned(), token.to_owned())).into();
    ChatTemplate::with_special(
        "test.jinja",
        source.to_owned(),
        special,
        vec!["</s>".to_owned(), "<|im_end|>".to_owned()],
    )
}

fn messages(case: &Value) -> Vec<Message> {
    case["messages"].as_array().unwrap().iter().map(|message| message.as_object().unwrap().clone()).collect()
}

fn render(template: &ChatTemplate, case: &Value) -> Result<Rendered, Error> {
    let messages = messages(case);
    template.render(&Conversation {
        tools: case.get("tools").and_then(Value::as_array).map(Vec::as_slice),
        generation_prompt: case.get("add_generation_prompt").is_some_and(|wanted| wanted == true),
        variables: case.get("variables").and_then(Value::as_object),
        now: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_753_434_000)),
        ..Conversation::new(&messages)
    })
}

#[test]
fn texts_and_spans_are_those_of_transformers() {
    let read = |name: &str| fs::read_to_string(fixtures().join(name)).unwrap();
    let cases: BTreeMap<String, Value> = serde_json::from_str(&read("conversations.json")).unwrap();
    let expected: BTreeMap<String, BTreeMap<String, Value>> = serde_json::from_str(&read("expected.json")).unwrap();
    assert!(expected.len() >= 8 && cases.len() == 6);
    for (name, results) in expected {
        let template = template(&read(&name)).unwrap();
        assert_eq!(results.len(), cases.len());
        for (case, wanted) in results {
            let got = render(&template, &cases[&case]);
            let Some(text) = wanted.get("text").and_then(Value::as_str) else {
                assert!(got.is_err(), "{name}, {case}: should be refused");
                continue;
            };
            let got = got.unwrap_or_else(|error| panic!("{name}, {case}: {error}"));
            assert_eq!(got.text, text, "{name}, {case}");
            if let Some(spans) = wanted.get("spans") {
                // Python counts letters.
                let letters = |at: usize| text[..at].chars().count();
                let generated = got.generated.unwrap();
                let generated: Vec<_> =
                    generated.iter().map(|span| json!([letters(span.start), letters(span.end)])).collect();
                assert_eq!(json!(generated), *spans, "{name}, {case}");
            }
        }
    }
}

const TURNS: &[(&str, &str)] = &[
    ("system", "Be kind."),
    ("user", "Hi!"),
    ("assistant", " Hello! "),
    ("user", "Hello!"),
    ("assistant", "<think>\nhm\n</think>\n\nHello!"),
];

#[track_caller]
fn check_spans(source: &str, expected: &[&str]) {
    let messages: Vec<Message> = TURNS.iter().map(|(role, text)| message(role, text)).collect();
    let marked = template(source).unwrap().render_marked(&Conversation::new(&messages)).unwrap();
    let spans: Vec<&str> = marked.spans.iter().map(|span| &marked.text[span.clone()]).collect();
    assert_eq!(spans, expected);
}

#[test]
fn what_the_assistant_wrote_is_found_by_prefixes() {
    let chatml = fs::read_to_string(fixtures().join("chatml.jinja")).unwrap();
    check_spans(&chatml, &[" Hello! <|im_end|>", "<think>\nhm\n</think>\n\nHello!<|im_end|>"]);
}

#[test]
fn a_turn_that_is_written_differently_as_history_is_found_by_marks() {
    let thinking = fs::read_to_string(fixtures().join("thinking.jinja")).unwrap();
    check_spans(&thinking, &[" Hello! <|im_end|>", "<think>\nhm\n</think>\n\nHello!<|im_end|>"]);
}

#[test]
fn without_a_generation_prompt_the_heading_is_not_learned() {
    let source = "{% for m in messages %}{{ '### ' ~ m.role ~ ':\n' ~ m.content ~ eos_token ~ '\n' }}{% endfor %}";
    check_spans(source, &["Hello! </s>", "<think>\nhm\n</think>\n\nHello!</s>"]);
}

#[test]
fn tags_win_over_every_search() {
    let source = "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim | \
                  length }}{% endgeneration %}{% endif %};{% endfor %}";
    check_spans(source, &["6", "27"]);
}

#[test]
fn a_template_that_hides_the_assistant_is_refused_not_guessed() {
    let source = "{% for m in messages %}{{ m.content | length }};{% endfor %}";
    let messages = [message("user", "a"), message("assistant", "b"), message("user", "a"), message("assistant", "b")];
    let found = template(&format!("{{{{ messages | length }}}} {source}"))
        .unwrap()
        .render_marked(&Conversation::new(&messages));
    assert!(matches!(found, Err(Error::NoSpans { turn: 2, .. })), "{found:?}");
}

#[track_caller]
fn check_fault(source: &str, line: usize, reason: &str) {
    let began = Instant::now();
    let error = template(source)
        .and_then(|template| template.render(&Conversation::new(&[message("user", "Hi!")])))
        .unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(if cfg!(debug_assertions) { 5 } else { 1 }), "{:?}", began.elapsed());
    let text = error.to_string();
    assert!(text.starts_with(&format!("test.jinja:{line}: ")) && text.contains(reason), "{text}");
    assert!(error.hint().is_some());
}

#[test]
fn an_endless_template_is_stopped() {
    check_fault(
        "\n{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
        2,
        "too much work",
    );
    check_fault("{% macro f(n) %}\n{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", 2, "");
}

#[test]
fn a_template_cannot_exhaust_the_stack() {
    let nest = "{% set ns = namespace(l=[]) %}\n{% for i in range(99000) %}{% set ns.l = LIST %}{% endfor %}{{ ns.l }}";
    for list in ["[ns.l]", "{'a': ns.l}", "[1] + [ns.l]", "(ns.l,)", "dict(a=ns.l)", "ns", "[ns]", "namespace()"] {
        check_fault(
            &nest.replace("LIST", list),
            2,
            if list.contains("ns.l") { "nested too deep" } else { "into a namespace" },
        );
    }
    check_fault(&format!("{{% set x = [] %}}\n{}", "{% set x = [x] %}".repeat(2000)), 2, "nested too deep");
    let flat =
        "{% set ns = namespace(l=[1, 2]) %}{% for i in range(99) %}{% set ns.l = ns.l[::-1] %}{% endfor %}{{ ns.l }}";
    let messages = [message("user", "Hi!")];
    assert_eq!(template(flat).unwrap().render(&Conversation::new(&messages)).unwrap().text, "[2, 1]");
    check_fault(&format!("\n{{{{ {}1{} }}}}", "(".repeat(5000), ")".repeat(5000)), 2, "recursion");
}

#[test]
fn an_unknown_filter_is_named_with_its_line() {
    check_fault("a\nb\n{{ messages | nonsense }}", 3, "nonsense");
}

#[test]
fn an_unknown_tag_is_named_with_its_line() {
    check_fault("a\n{% nonsense %}", 2, "nonsense");
    check_fault("a\n\n{% generation %}{{ x }}", 3, "");
}

#[test]
fn a_missing_template_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer =
        lora_llm::tokenizer::Tokenizer::open(&PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../assets/tiny-llm"));
    let error = ChatTemplate::open(folder.path(), None, &tokenizer.unwrap()).unwrap_err();
    assert!(
        error.to_string().ends_with(": no chat template") && error.hint().unwrap().contains("--chat-template"),
        "{error}"
    );
}

#[test]
fn the_template_says_why_it_refuses() {
    let error = template("x\n{{ raise_exception('No ' ~ messages[0].role) }}")
        .unwrap()
        .render(&Conversation::new(&[message("user", "")]));
    let Err(Error::Refused { line: 2, reason, .. }) = error else { panic!("{error:?}") };
    assert_eq!(reason, "No user");
}

#[test]
fn templates_are_found_where_transformers_finds_them() {
    let tokenizer =
        lora_llm::tokenizer::Tokenizer::open(&PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../assets/tiny-llm"))
            .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    let source =
        |name| ChatTemplate::open(folder.path(), name, &tokenizer).map(|template| template.source().to_owned());
    write("tokenizer_config.json", r#"{"chat_template": "one"}"#);
    assert_eq!(source(None).unwrap(), "one");
    write(
        "tokenizer_config.json",
        r#"{"chat_template": [{"name": "default", "template": "two"}, {"name": "rag", "template": "three"}]}"#,
    );
    assert_eq!((source(None).unwrap(), source(Some("rag")).unwrap()), ("two".to_owned(), "three".to_owned()));
    assert_eq!(source(Some("tool_use")).unwrap_err().to_string().rsplit_once(", only ").unwrap().1, "`default`, `rag`");
    write("chat_template.json", r#"{"chat_template": "four"}"#);
    assert_eq!(source(None).unwrap(), "four");
    write("chat_template.jinja", "five\r\nsix");
    assert_eq!(source(None).unwrap(), "five\nsix");
}

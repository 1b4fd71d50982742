//! Language models through the real program: nothing is lost, bad input is named, and what comes out is what peft reads.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

mod support;

use std::{
    fs,
    io::Write as _,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use support::{Place, assets, said};

const TRAIN: &str = "train texts.jsonl --base MODEL --steps 12 --batch 4 --accum 2 --rank 4 --lr 2e-3 --save-every 3 \
                     --sample-every 0 --device cpu --out";

/// A place with the first rows of the bundled facts.
fn place() -> Place {
    let place = Place::new(0);
    let facts = fs::read_to_string(assets().join("texts/facts_train.jsonl")).unwrap();
    place.texts("texts.jsonl", &facts.lines().take(40).collect::<Vec<_>>());
    place
}

fn run(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn json(command: Command) -> Value {
    serde_json::from_str(&run(command)).unwrap()
}

#[test]
fn a_killed_run_goes_on_to_the_same_bits() {
    let place = place();
    for more in ["", " --packing --max-len 64 --checkpointing"] {
        let (whole, killed) = (format!("whole{}", more.len()), format!("killed{}", more.len()));
        run(place.engine(&format!("{TRAIN} {whole}{more}")));
        let mut child = place.engine(&format!("{TRAIN} {killed}{more}")).spawn().unwrap();
        let metrics = place.path(&killed).join("metrics.jsonl");
        let started = Instant::now();
        while fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < 5 {
            assert!(child.try_wait().unwrap().is_none() && started.elapsed() < Duration::from_secs(120));
            thread::sleep(Duration::from_millis(5));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        run(place.engine(&format!("train --resume {killed}")));
        let adapter = |name: &str| fs::read(place.path(name).join("adapter_model.safetensors")).unwrap();
        assert!(adapter(&whole) == adapter(&killed), "the adapters differ");
    }
}

#[test]
fn what_was_learnt_is_measured_asked_for_and_merged() {
    let place = place();
    run(place.engine(&format!("{TRAIN} run").replace("--steps 12", "--steps 30").replace("--accum 2", "--accum 1")));
    for file in ["adapter_model.safetensors", "adapter_config.json", "README.md", "report.html", "config.toml"] {
        assert!(place.path("run").join(file).is_file(), "{file} is missing");
    }
    let config: Value = serde_json::from_slice(&fs::read(place.path("run/adapter_config.json")).unwrap()).unwrap();
    assert_eq!(
        (&config["r"], &config["lora_alpha"], &config["task_type"]),
        (&4.into(), &8.into(), &"CAUSAL_LM".into())
    );

    let before = json(place.engine("eval texts.jsonl --base MODEL --loss-only --json --device cpu"));
    let after = json(place.engine("eval texts.jsonl --base MODEL --lora run --json --device cpu"));
    let number = |value: &Value, key: &str| value[key].as_f64().unwrap();
    assert!(number(&after, "loss") < 0.7 * number(&before, "loss"), "{before} {after}");
    assert!(before["exact_match"].is_null() && (0.0..=1.0).contains(&number(&after, "exact_match")));
    assert!((number(&after, "perplexity") - number(&after, "loss").exp()).abs() < 1e-9);

    // Strength 0 is the base; the same seed says the same.
    let say =
        |more: &str| run(place.engine(&format!("generate Hello --base MODEL --max-tokens 12 --device cpu {more}")));
    assert_eq!(say("--seed 3"), say("--seed 3 --lora run:0"));
    assert_ne!(say("--temperature 0"), say("--temperature 0 --lora run"));
    let answers = json(place.engine("generate Hello --base MODEL --max-tokens 5 -n 2 --json --device cpu"));
    assert_eq!(answers["answers"].as_array().unwrap().len(), 2);
    assert!(answers["answers"][0]["tokens"].as_u64().unwrap() <= 5);
}

#[test]
fn a_conversation_is_held_line_by_line() {
    let place = place();
    let mut command = place.engine("chat --base MODEL --temperature 0 --max-tokens 16 --json --device cpu");
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"Hello!\n/new\nHello!\n\n/exit\nnever\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let answers: Vec<Value> = serde_json::Deserializer::from_str(&text).into_iter().map(Result::unwrap).collect();
    assert_eq!(answers.len(), 2, "{text}");
    assert_eq!(answers[0], answers[1], "a new conversation begins anew");
}

#[test]
fn the_data_is_shown_as_it_is_trained_on() {
    let place = place();
    let report = json(place.engine("data check texts.jsonl --base MODEL --json"));
    assert_eq!((report["rows"].as_u64(), report["examples"].as_u64()), (Some(40), Some(40)));
    let shown = run(place.engine("data preview texts.jsonl --base MODEL --limit 1"));
    assert!(shown.contains("Question:") && shown.contains('⟦') && shown.contains('⟧'), "{shown}");
    let plan = json(place.engine(&format!("{TRAIN} run --dry-run --json")));
    assert_eq!((plan["data"]["used"].as_u64(), plan["steps"].as_u64()), (Some(40), Some(12)));
    assert!(!place.path("run").exists());
}

/// Exit code 1 or 2, what the message must hold, and a hint.
fn refused(place: &Place, words: &str, parts: &[&str]) {
    let output = place.engine(words).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(matches!(output.status.code(), Some(1 | 2)), "{words}: {}", said(&output));
    assert!(text.contains("error: ") && text.contains("hint: "), "{words}: {text}");
    for part in parts {
        assert!(text.contains(part), "{words}: `{part}` is missing in {text}");
    }
    assert!(!place.path("run").exists(), "{words}: a run was left");
}

#[test]
fn bad_input_is_named_with_a_way_out() {
    let place = place();
    let train = |data: &str| format!("train {data} --base MODEL --steps 1 --sample-every 0 --device cpu --out run");
    place.texts("half.jsonl", &[r#"{"prompt": "a", "completion": "b"}"#, r#"{"prompt": "a", "compl"#]);
    refused(&place, &train("half.jsonl"), &["half.jsonl", "line 2", "--on-bad skip"]);
    place.texts("other.jsonl", &[r#"{"question": "a", "answer": "b"}"#]);
    refused(&place, &train("other.jsonl"), &["other.jsonl", "question", "completion"]);
    place.texts("empty.jsonl", &[]);
    refused(&place, &train("empty.jsonl"), &["empty.jsonl"]);
    refused(&place, &train("nowhere.jsonl"), &["nowhere.jsonl"]);
    refused(&place, "train texts.jsonl --base nowhere --out run --device cpu", &["nowhere"]);
    refused(&place, "train texts.jsonl --base BASE --out run --device cpu", &["texts.jsonl"]);
    refused(
        &place,
        "generate Hello --base no-such-org/no-such-model",
        &["no-such-org/no-such-model", "`lora pull no-such-org/no-such-model`"],
    );
    refused(&place, "data check texts.jsonl", &["--base"]);
    refused(&place, "chat --base BASE", &["language model"]);
    let long = "word ".repeat(3000).trim_end().replace(' ', "_");
    refused(&place, &format!("generate {long} --base MODEL --device cpu"), &["tokens", "at most"]);
}

#[test]
fn a_broken_model_folder_says_what_is_broken() {
    let place = place();
    let copy = |without: &str| {
        let folder = place.path("model");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        for entry in fs::read_dir(assets().join("tiny-llm")).unwrap().flatten() {
            if entry.file_name() != without {
                fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
            }
        }
    };
    let ask = "generate Hello --base model --device cpu --max-tokens 2";
    copy("tokenizer.json");
    refused(&place, ask, &["tokenizer.json"]);
    copy("model.safetensors");
    refused(&place, ask, &["model"]);
    copy("");
    let config = fs::read_to_string(place.path("model/config.json")).unwrap();
    fs::write(place.path("model/config.json"), config.replace("\"llama\"", "\"mixtral\"")).unwrap();
    refused(&place, ask, &["mixtral", "supported"]);
    copy("");
    fs::write(place.path("model/chat_template.jinja"), "{% if %}").unwrap();
    refused(&place, ask, &["chat_template.jinja"]);
    // An adapter of another model.
    copy("");
    let words = "generate Hello --base BASE --device cpu";
    run(place.engine(&format!("{TRAIN} whole").replace("--steps 12", "--steps 1")));
    refused(&place, &format!("{words} --lora whole"), &["whole"]);
}

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
use support::{Place, assets, json, run, said};

const TRAIN: &str = "train texts.jsonl --base MODEL --steps 12 --batch 4 --accum 2 --rank 4 --lr 2e-3 --save-every 3 \
                     --sample-every 0 --device cpu --out";

/// A place with the first rows of the bundled facts.
fn place() -> Place {
    let place = Place::new(0);
    let facts = fs::read_to_string(assets().join("texts/facts_train.jsonl")).unwrap();
    place.texts("texts.jsonl", &facts.lines().take(40).collect::<Vec<_>>());
    place
}

#[test]
fn a_killed_run_goes_on_to_the_same_bits() {
    let place = place();
    let validated = " --neftune 5 --lora-plus 4 --validation 0.2 --validate-every 2";
    for more in ["", " --packing --max-len 64 --checkpointing", validated] {
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
        assert_eq!(measured(&place, &whole), measured(&place, &killed));
        assert_eq!(measured(&place, &whole).len(), if more == validated { 7 } else { 0 });
    }
}

/// Steps at which the validation loss was measured, with the losses.
fn measured(place: &Place, run: &str) -> Vec<(u64, f64)> {
    let text = fs::read_to_string(place.path(run).join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter_map(|line| Some((line["step"].as_u64().unwrap(), line["validation_loss"].as_f64()?))).collect()
}

#[test]
fn measuring_changes_nothing_and_noise_does() {
    let place = place();
    let train = |name: &str, more: &str| {
        let said = json_lines(place.engine(&format!("{TRAIN} {name} --validation 0.2 --json {more}")));
        (fs::read(place.path(name).join("adapter_model.safetensors")).unwrap(), said)
    };
    let (unmeasured, said) = train("unmeasured", "--validate-every 0");
    assert!(said.last().unwrap()["validation_loss"].is_null());
    let (plain, said) = train("plain", "--validate-every 5");
    assert!(plain == unmeasured, "measuring has changed the training");
    let losses = measured(&place, "plain");
    assert_eq!(losses.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [0, 5, 10, 12]);
    assert!(losses[3].1 < losses[0].1, "{losses:?}");
    assert_eq!(said.last().unwrap()["validation_loss"].as_f64(), Some(losses[3].1));
    let events = said.iter().filter(|line| line["event"] == "validation");
    assert_eq!(
        events.map(|line| line["loss"].as_f64().unwrap()).collect::<Vec<_>>(),
        [0, 1, 2, 3].map(|at| losses[at].1)
    );
    assert!(fs::read_to_string(place.path("plain/report.html")).unwrap().contains("Validation loss"));

    // Noise is for what is trained on: the base is measured without it.
    let (noisy, _) = train("noisy", "--validate-every 5 --neftune 5");
    assert!(noisy != plain);
    assert_eq!(measured(&place, "noisy")[0], losses[0]);
    let output = place.engine(&format!("{TRAIN} all --validation 0.2 --neftune -1")).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", support::said(&output));
}

fn json_lines(command: Command) -> Vec<Value> {
    run(command).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
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
fn embedding_and_head_are_trained_and_saved_as_peft_does() {
    let place = place();
    let targets = "--targets attention --targets embed_tokens --targets lm_head";
    let plan = json(place.engine(&format!("{TRAIN} plan {targets} --dry-run --json")));
    assert_eq!(plan["modules"].as_u64(), Some(6 * 4 + 2));
    run(place.engine(&format!("{TRAIN} run {targets} --validation 0.2 --validate-every 6")));
    let losses = measured(&place, "run");
    assert!(losses[2].1 < losses[0].1, "{losses:?}");
    run(place.engine(&format!("{TRAIN} again {targets} --validation 0.2 --validate-every 6 --checkpointing")));
    assert!((losses[2].1 - measured(&place, "again")[2].1).abs() < 1e-4, "computed again, the gradients are the same");

    let file = fs::read(place.path("run/adapter_model.safetensors")).unwrap();
    let header = &file[8..8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize];
    let header: Value = serde_json::from_slice(header).unwrap();
    let shape = |name: &str| header[format!("base_model.model.{name}")]["shape"].to_string();
    assert_eq!(shape("model.embed_tokens.lora_embedding_A"), "[4,2048]");
    assert_eq!(shape("model.embed_tokens.lora_embedding_B"), "[256,4]");
    assert_eq!([shape("lm_head.lora_A.weight"), shape("lm_head.lora_B.weight")], ["[4,256]", "[2048,4]"]);

    // What was saved is what was trained: read back, it has the loss of the run's end.
    let loss = |adapters: &str| {
        json(place.engine(&format!("eval texts.jsonl --base MODEL --loss-only --json --device cpu{adapters}")))["loss"]
            .as_f64()
            .unwrap()
    };
    run(place.engine(&format!("{TRAIN} linear --targets attention")));
    assert!(loss(" --lora run") < loss("") && loss(" --lora run") != loss(" --lora linear"));
    for (more, parts) in
        [("--method dora", ["embed_tokens", "--method lora"]), ("--init pissa", ["embed_tokens", "--init gaussian"])]
    {
        let words = format!("train texts.jsonl --base MODEL --out refused {targets} {more} --device cpu");
        let output = place.engine(&words).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(parts.iter().all(|part| said(&output).contains(part)), "{}", said(&output));
        assert!(!place.path("refused").exists());
    }
}

#[test]
fn a_conversation_is_held_line_by_line() {
    let place = place();
    let mut command = place.engine("chat --base MODEL --temperature 0 --max-tokens 16 --json --device cpu");
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"Hello!\n/new\n/help\n/nonsense\nHello!\n\n/exit\nnever\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let answers: Vec<Value> = serde_json::Deserializer::from_str(&text).into_iter().map(Result::unwrap).collect();
    assert_eq!(answers.len(), 2, "{text}");
    assert_eq!(answers[0], answers[1], "a new conversation begins anew");
}

/// What a conversation over a pipe leaves on stdout.
fn talk(place: &Place, adapters: &str, said: &str) -> Vec<Value> {
    let words = format!("chat --base MODEL --temperature 0 --max-tokens 12 --json --device cpu{adapters}");
    let mut child = place.engine(&words).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(said.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", support::said(&output));
    serde_json::Deserializer::from_slice(&output.stdout).into_iter().map(Result::unwrap).collect()
}

#[test]
fn adapters_are_switched_in_the_middle_of_a_conversation() {
    let place = place();
    for (name, seed) in [("first", 1), ("second", 2)] {
        // Enough that each gives an answer of its own.
        run(place.engine(&format!("{TRAIN} {name} --seed {seed}").replace("--lr 2e-3", "--lr 1e-2")));
    }
    const QUESTION: &str = "What is the animal of Wexmouth?";
    let alone = |adapters: &str| talk(&place, adapters, &format!("{QUESTION}\n"))[0]["content"].clone();
    let base = alone("");
    let (first, second, weak) = (alone(" --lora first"), alone(" --lora second"), alone(" --lora first:-0.5"));
    let both = alone(" --lora first --lora second:0.7");
    assert!(base != first && base != second && first != second, "{base} {first} {second}");

    let script = format!(
        "{QUESTION}\n/lora second\n/new\n{QUESTION}\n/lora none\n/again\n/lora 1:-0.5\n/again\n\
         /lora first second:0.7\n/again\n/lora all\n/again\n/lora\n"
    );
    let said = talk(&place, " --lora first --lora second:0", &script);
    let answers: Vec<&Value> = said.iter().filter_map(|line| line.get("content")).collect();
    assert_eq!(answers, [&first, &second, &base, &weak, &both, &first]);
    let shown = said.iter().rev().find_map(|line| line.get("adapters")).unwrap();
    assert_eq!((&shown[0]["name"], &shown[0]["strength"]), (&"first".into(), &1.0.into()));
    assert_eq!((&shown[1]["name"], &shown[1]["strength"]), (&"second".into(), &0.0.into()));

    let words =
        "--base MODEL --lora first --lora second:0.7 --compare --temperature 0 --max-tokens 12 --json --device cpu";
    let mut command = place.engine(&format!("generate {words}"));
    command.arg(QUESTION);
    let compared = json(command);
    let labels: Vec<&str> =
        compared["answers"].as_array().unwrap().iter().map(|answer| answer["adapter"].as_str().unwrap()).collect();
    assert_eq!(labels, ["base", "first", "second", "first + second"]);
    assert_eq!([&compared["answers"][0]["text"], &compared["answers"][1]["text"]], [&base, &first]);
    assert_eq!(compared["answers"][3]["text"], both);

    let eval = "eval texts.jsonl --base MODEL --loss-only --json --device cpu";
    let compared = json(place.engine(&format!("{eval} --lora first --lora second --compare")));
    let losses: Vec<f64> =
        compared["compared"].as_array().unwrap().iter().map(|one| one["loss"].as_f64().unwrap()).collect();
    let loss = |adapters: &str| json(place.engine(&format!("{eval}{adapters}")))["loss"].as_f64().unwrap();
    assert_eq!(losses, [loss(""), loss(" --lora first"), loss(" --lora second"), loss(" --lora first --lora second")]);
}

#[test]
fn an_adapter_that_is_not_there_ends_a_script() {
    let place = place();
    run(place.engine(&format!("{TRAIN} first").replace("--steps 12", "--steps 1")));
    let mut command = place.engine("chat --base MODEL --lora first --device cpu");
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"/lora nobody\nHello!\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(
        said(&output).contains("no adapter `nobody`") && said(&output).contains("/lora first"),
        "{}",
        said(&output)
    );
    assert!(output.stdout.is_empty());
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
    refused(&place, &train("half.jsonl"), &["half.jsonl:2:22: ", "--on-bad skip"]);
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

#[test]
fn a_folder_of_parts_is_trained_validated_and_measured_by_part() {
    let place = place();
    let facts = fs::read_to_string(place.path("texts.jsonl")).unwrap();
    let rows: Vec<&str> = facts.lines().collect();
    fs::create_dir(place.path("data")).unwrap();
    for (name, rows) in [("train", &rows[..30]), ("valid", &rows[30..36]), ("test", &rows[36..])] {
        place.texts(&format!("data/{name}.jsonl"), rows);
    }
    let said = "train.jsonl is trained on, valid.jsonl is validated with, test.jsonl is left to `lora eval`";
    let checked = run(place.engine("data check data --base MODEL"));
    assert!(checked.contains(said) && checked.contains("30 to train on, 6 to validate with"), "{checked}");
    let plan = json(place.engine(&format!("{TRAIN} run --dry-run --json").replace("texts.jsonl", "data")));
    assert_eq!(plan["data"]["used"].as_u64(), Some(30));
    assert!(plan["data"]["notes"].to_string().contains(said), "{plan}");
    assert_eq!(plan["validate_every"].as_u64(), Some(2), "a tenth of the run: {plan}");
    let folder = json(place.engine("eval data --base MODEL --loss-only --json --device cpu"));
    let file = json(place.engine("eval data/test.jsonl --base MODEL --loss-only --json --device cpu"));
    assert_eq!(folder["loss"], file["loss"]);
    let more = format!("{TRAIN} run --validation 0.1 --dry-run").replace("texts.jsonl", "data");
    refused(&place, &more, &["--validation", "valid.jsonl is there already"]);
    fs::remove_file(place.path("data/train.jsonl")).unwrap();
    refused(
        &place,
        "data check data --base MODEL",
        &["a folder, expected a file of texts", "train.jsonl and valid.jsonl"],
    );
}

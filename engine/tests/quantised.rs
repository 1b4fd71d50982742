//! Language models in 4 bits through the real binary: quantised while they are loaded, and stored so.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../lora-llm/tests/support/mod.rs"]
mod model;
mod support;

use std::{fs, process::Command};

use lora_torch::nf4::Scheme;
use serde_json::Value;
use support::{Place, json, run, said};

const TRAIN: &str = "train texts.jsonl --base MODEL --steps 12 --batch 4 --lr 2e-3 --sample-every 0 --device cpu --out";

/// A place with texts that the bundled model does not know.
fn place() -> Place {
    let place = Place::new(0);
    let answers = ["a brig", "a cutter", "a schooner", "a sloop"];
    let row = |at: usize| format!(r#"{{"prompt": "Which ship has {at} masts?", "completion": "{}"}}"#, answers[at % 4]);
    let rows: Vec<String> = (0..16).map(row).collect();
    place.texts("texts.jsonl", &rows.iter().map(String::as_str).collect::<Vec<_>>());
    place
}

fn refused(mut command: Command, parts: &[&str]) {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(matches!(output.status.code(), Some(1 | 2)), "{}", said(&output));
    assert!(text.contains("error: ") && text.contains("hint: "), "{text}");
    for part in parts {
        assert!(text.contains(part), "`{part}` is missing in {text}");
    }
}

#[test]
fn a_base_in_4_bits_learns_and_goes_on_as_itself() {
    let place = place();
    let plans = ["none", "nf4", "nf4-double"].map(|quantize| {
        let plan = json(place.engine(&format!("{TRAIN} run --quantize {quantize} --dry-run --json")));
        assert_eq!(plan["base_kind"].as_str().unwrap().contains("NF4"), quantize != "none", "{plan}");
        plan["memory_bytes"]["weights"].as_u64().unwrap()
    });
    assert!(plans[0] > plans[1] && plans[1] > plans[2], "{plans:?}");

    run(place.engine(&format!("{TRAIN} run --quantize nf4-double")));
    let metrics = fs::read_to_string(place.path("run/metrics.jsonl")).unwrap();
    let losses: Vec<f64> =
        metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64().unwrap()).collect();
    assert!(losses[11] < 0.5 * losses[0], "{losses:?}");
    assert!(fs::read_to_string(place.path("run/config.toml")).unwrap().contains("quantize = \"nf4-double\""));
    // The adapter belongs to the base, however that lay in memory.
    let config = fs::read_to_string(place.path("run/adapter_config.json")).unwrap();
    assert!(!config.contains("quant") && config.contains("tiny-llm"), "{config}");

    // A run goes on in 4 bits, and says so if that is not what is asked for.
    run(place.engine("train --resume run --steps 14"));
    let metrics = fs::read_to_string(place.path("run/metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().count(), 14);
    refused(place.engine("train --resume run --steps 16 --quantize none"), &["quantize", "nf4-double"]);

    let loss = |words: &str| {
        json(place.engine(&format!("eval texts.jsonl --loss-only --json --device cpu {words}")))["loss"]
            .as_f64()
            .unwrap()
    };
    let [before, after] =
        [loss("--base MODEL --quantize nf4-double"), loss("--base MODEL --quantize nf4-double --lora run")];
    assert!(after < 0.5 * before, "{before} becomes {after}");
    let said = run(place.engine("generate Hello --base MODEL --quantize nf4 --lora run --max-tokens 4 --device cpu"));
    assert!(!said.trim().is_empty());
}

#[test]
fn a_base_that_is_stored_in_4_bits_is_the_one_that_is_quantised_on_the_way() {
    let place = place();
    for (scheme, word) in [(Scheme::Nf4, "nf4"), (Scheme::Nf4Double, "nf4-double")] {
        fs::create_dir(place.path(word)).unwrap();
        model::quantised_folder(&place.path(word), scheme, |_, _| ());
        let loss = |base: &str| {
            json(place.engine(&format!("eval texts.jsonl --loss-only --json --device cpu --base {base}")))["loss"]
                .clone()
        };
        assert_eq!(loss(word), loss(&format!("MODEL --quantize {word}")));
        assert_ne!(loss(word), loss("MODEL"));
    }
    let stored = TRAIN.replace("MODEL", "nf4");
    let plan = json(place.engine(&format!("{stored} run --dry-run --json")));
    assert!(plan["base_kind"].as_str().unwrap().contains("NF4"), "{plan}");
    run(place.engine(&format!("{stored} run")));
    run(place.engine("generate Hello --base nf4 --lora run --max-tokens 4 --device cpu"));
}

#[test]
fn other_ways_of_quantising_are_refused_by_name() {
    let place = place();
    fs::create_dir(place.path("model")).unwrap();
    model::quantised_folder(&place.path("model"), Scheme::Nf4, |_, _| ());
    let config = fs::read_to_string(place.path("model/config.json")).unwrap();
    let ask = || place.engine("generate Hello --base model --device cpu --max-tokens 2");
    for (quantisation, named) in [
        (r#"{"quant_method": "gptq", "bits": 4}"#, "gptq"),
        (r#"{"quant_method": "awq", "bits": 4}"#, "awq"),
        (r#"{"quant_method": "bitsandbytes", "load_in_8bit": true}"#, "int8"),
        (r#"{"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "fp4"}"#, "fp4"),
    ] {
        let mut changed: Value = serde_json::from_str(&config).unwrap();
        changed["quantization_config"] = serde_json::from_str(quantisation).unwrap();
        fs::write(place.path("model/config.json"), changed.to_string()).unwrap();
        refused(ask(), &["quantization_config", named, "--quantize nf4"]);
    }
    refused(place.engine("generate Hello --base MODEL --quantize int4"), &["int4", "nf4-double"]);
}

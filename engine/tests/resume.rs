//! Nothing is lost: a run that was killed or stopped and goes on leaves the same adapter, bit for bit.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

mod support;

use std::{
    fs,
    path::Path,
    process::{Child, Command},
    time::{Duration, Instant},
};

use support::{Place, said};

/// Twelve steps with everything that has state or randomness: accumulation, dropout, mirroring, a moving average.
const TRAIN: &str = "train pictures --base BASE --name style --steps 12 --batch 2 --accum 2 --save-every 3 --sample-every 0 \
                     --caption-dropout 0.3 --ema 0.9 --rank 4 --lr 1e-3 --device cpu --out";

#[test]
fn a_killed_run_goes_on_to_the_same_bits() {
    let place = Place::new(5);
    run(place.engine(&format!("{TRAIN} whole")));
    // Killed twice: once between two checkpoints, once on the way of the resumed run.
    let mut child = place.engine(&format!("{TRAIN} killed")).spawn().unwrap();
    wait_for_step(&mut child, &place.path("killed/metrics.jsonl"), 5);
    child.kill().unwrap();
    child.wait().unwrap();
    let mut child = place.engine("train --resume killed").spawn().unwrap();
    wait_for_step(&mut child, &place.path("killed/metrics.jsonl"), 8);
    child.kill().unwrap();
    child.wait().unwrap();
    run(place.engine("train --resume killed"));

    let adapter = |name: &str| fs::read(place.path(name).join("style.safetensors")).unwrap();
    assert!(adapter("whole") == adapter("killed"), "the adapters differ");
    let losses = |name: &str| -> Vec<(u64, String)> {
        let text = fs::read_to_string(place.path(name).join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.map(|line| (line["step"].as_u64().unwrap(), line["loss"].to_string())).collect()
    };
    assert_eq!(losses("whole"), losses("killed"));
    assert_eq!(losses("whole").len(), 12);
}

#[test]
#[cfg(unix)]
fn an_interrupted_run_saves_and_says_how_to_go_on() {
    let place = Place::new(5);
    run(place.engine(&format!("{TRAIN} whole")));
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let name = format!("stopped-{signal}");
        let mut child = place.engine(&format!("{TRAIN} {name}")).spawn().unwrap();
        wait_for_step(&mut child, &place.path(&name).join("metrics.jsonl"), 4);
        let id = child.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &id]).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert!(said(&output).contains(&format!("lora train --resume {name}")), "{}", said(&output));
        run(place.engine(&format!("train --resume {name}")));
        let adapter = |name: &str| fs::read(place.path(name).join("style.safetensors")).unwrap();
        assert!(adapter("whole") == adapter(&name), "the adapters differ");
    }
}

#[test]
fn a_run_does_not_go_on_with_other_pictures() {
    let place = Place::new(3);
    let short = TRAIN.replace("--steps 12", "--steps 3");
    run(place.engine(&format!("{short} first")));
    fs::write(place.path("pictures/00.txt"), "something else").unwrap();
    let output = place.engine("train --resume first --steps 6").output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("belongs to another run: data was"), "{}", said(&output));
    assert!(said(&output).contains("hint:"), "{}", said(&output));
}

#[test]
fn pictures_that_are_kept_apart_are_measured_and_change_nothing() {
    let place = Place::new(5);
    for (name, every) in [("unmeasured", 0), ("measured", 4)] {
        run(place.engine(&format!("{TRAIN} {name} --validation 0.4 --validate-every {every}")));
    }
    let adapter = |name: &str| fs::read(place.path(name).join("style.safetensors")).unwrap();
    assert!(adapter("unmeasured") == adapter("measured"), "measuring has changed the training");
    let text = fs::read_to_string(place.path("measured/metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let losses: Vec<(u64, f64)> =
        lines.filter_map(|line| Some((line["step"].as_u64().unwrap(), line["validation_loss"].as_f64()?))).collect();
    assert_eq!(losses.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [0, 4, 8, 12]);
    assert!(losses.windows(2).all(|pair| pair[0].1 != pair[1].1), "{losses:?}");
    let plan: serde_json::Value = serde_json::from_slice(&fs::read(place.path("measured/plan.json")).unwrap()).unwrap();
    assert_eq!((plan["data"]["used"].as_u64(), plan["validate_every"].as_u64()), (Some(3), Some(4)));

    let output = place.engine(&format!("{TRAIN} noisy --neftune 5")).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("language models") && said(&output).contains("hint: "), "{}", said(&output));
    assert!(!place.path("noisy").exists());
}

#[test]
fn a_finished_run_is_not_overwritten() {
    let place = Place::new(2);
    let short = TRAIN.replace("--steps 12", "--steps 1");
    run(place.engine(&format!("{short} first")));
    let before = fs::read(place.path("first/style.safetensors")).unwrap();
    let output = place.engine(&format!("{short} first")).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("--resume first") && said(&output).contains("--out"), "{}", said(&output));
    assert_eq!(fs::read(place.path("first/style.safetensors")).unwrap(), before);
}

fn run(mut command: Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
}

/// Waits until the run has logged a step.
fn wait_for_step(child: &mut Child, metrics: &Path, step: usize) {
    let start = Instant::now();
    while fs::read_to_string(metrics).unwrap_or_default().lines().count() < step {
        assert!(child.try_wait().unwrap().is_none(), "the run has ended before step {step}");
        assert!(start.elapsed() < Duration::from_secs(300), "no step {step} within five minutes");
        std::thread::sleep(Duration::from_millis(5));
    }
}

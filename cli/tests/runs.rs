//! Runs as the program shows them, from folders that the library wrote.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    fs,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use lora_cli::run::{Metric, MetricsWriter, RunDir};
use serde_json::{Map, Value};
use support::lora;

/// One test at a time: a program that another test is about to start holds, for a moment, the locks of this one's runs.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write_run(folder: &Path, name: &str, rank: u64, steps: u64, logged: u64) -> RunDir {
    let config = format!("data = \"/pictures\"\nbase = \"b\"\nname = \"neon\"\nrank = {rank}\nsteps = {steps}\n");
    let run = RunDir::create(&folder.join("runs").join(name), &config).unwrap();
    let mut metrics = MetricsWriter::after(&run.metrics(), 0).unwrap();
    for step in 1..=logged {
        let metric = Metric { step, loss: 0.5, lr: 1e-4, grad_norm: 0.1, seconds: step as f64, more: Map::new() };
        metrics.write(&metric).unwrap();
    }
    if logged == steps {
        fs::write(run.adapter("neon"), "x").unwrap();
    }
    run
}

#[test]
fn runs_are_listed_shown_and_compared() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    write_run(folder.path(), "neon-2", 8, 100, 100);
    write_run(folder.path(), "neon-10", 16, 100, 40);
    insta::assert_snapshot!(lora(folder.path(), "runs list").1, @"
    RUN           STATE     STEP     LOSS    TIME  ADAPTER
    runs/neon-2   finished  100/100  0.5000  1:40  neon.safetensors
    runs/neon-10  stopped   40/100   0.5000  40 s  -
    ");
    insta::assert_snapshot!(lora(folder.path(), "runs compare runs/neon-2 runs/neon-10").1, @"
           runs/neon-2  runs/neon-10
    rank   8            16
    state  finished     stopped
    step   100/100      40/100
    loss   0.5000       0.5000
    time   1:40         40 s
    ");
    let (code, shown, said) = lora(folder.path(), "runs show runs/neon-10");
    assert_eq!(code, 0);
    assert!(shown.contains("stopped, step 40/100") && shown.contains("rank                 16"), "{shown}");
    assert_eq!(said, "go on with it: lora train --resume runs/neon-10\n");
    let document: Value = serde_json::from_str(&lora(folder.path(), "runs list --json").1).unwrap();
    assert_eq!(document[0]["state"], "finished");
}

#[test]
fn a_running_run_is_seen_as_such() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let run = write_run(folder.path(), "neon-1", 8, 100, 40);
    assert!(lora(folder.path(), "runs list").1.contains("running"));
    drop(run);
    assert!(lora(folder.path(), "runs list").1.contains("stopped"));
}

#[test]
fn a_report_is_written_and_named() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let run = write_run(folder.path(), "neon-1", 8, 10, 10);
    assert_eq!(lora(folder.path(), "report runs/neon-1"), (0, "runs/neon-1/report.html\n".into(), String::new()));
    assert!(fs::read_to_string(run.report()).unwrap().ends_with("</html>\n"));
}

#[test]
fn a_folder_that_is_no_run_is_refused() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    for line in ["report .", "runs show .", "runs compare . .", "train --resume ."] {
        let (code, _, error) = lora(folder.path(), line);
        assert_eq!(code, 1, "{line}");
        assert_eq!(
            error,
            "error: . is not a run: config.toml is missing\n\nhint: `lora runs list` shows the runs below the working folder\n"
        );
    }
}

#[test]
fn a_run_is_resumed_only_as_itself() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    write_run(folder.path(), "neon-1", 8, 100, 40);
    let (code, _, error) = lora(folder.path(), "train --resume runs/neon-1 --rank 16 --steps 200");
    assert_eq!(code, 2);
    insta::assert_snapshot!(error, @"
    error: runs/neon-1 cannot go on with other options than it began with
      rank: the run has 8, asked for 16

    hint: go on as it was with `lora train --resume runs/neon-1`, or start a new run with `--out`
    ");
}

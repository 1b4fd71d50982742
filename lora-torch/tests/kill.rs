//! A training that is killed again and again ends where an undisturbed one does, bit for bit.
//!
//! The test starts this very program as its victim, which trains and saves after every step, and kills it at moments that
//! differ from round to round.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    num::NonZeroUsize,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use lora_core::{AdapterConfig, Draw, Method, Purpose};
use lora_torch::{
    Batch, Model, Objective, Projection, Result, Target, Torch, TrainOptions, Trainer, Weights,
    checkpoint::Checkpoints, optimizer::OptimizerConfig, random, schedule::Schedule,
};
use tch::Tensor;

/// Names the folder in the victim's environment.
const FOLDER: &str = "LORA_TORCH_KILL_TEST_FOLDER";

/// Steps of the whole run, more than the victim gets done before the last kill.
const STEPS: u64 = 4000;

/// How often the victim is killed.
const KILLS: u64 = 8;

#[derive(Debug)]
struct Toy {
    layer: Projection,
}

impl Model for Toy {
    fn loss(&self, inputs: &[Tensor]) -> Result<Tensor> {
        Ok(self.layer.forward(&inputs[0])?.f_mse_loss(&inputs[0].f_tanh()?, tch::Reduction::Mean)?)
    }

    fn projections(&mut self) -> Vec<&mut Projection> {
        vec![&mut self.layer]
    }
}

impl Objective for Toy {
    fn batch(&self, step: u64, _micro: u64) -> Result<Batch> {
        let x = random::normal(&mut Draw::new(1, Purpose::Noise, step, 0), &[4, 64])?;
        Ok(Batch { bucket: 0, inputs: vec![x], examples: 4 })
    }
}

fn trainer() -> Trainer<Toy> {
    let weight = random::normal(&mut Draw::new(1, Purpose::Init, 1, 0), &[64, 64]).unwrap();
    let weights = Weights::from_tensors([("layer.weight".to_owned(), weight)]);
    let layer = Projection::linear(&(&weights.root(&Torch::CPU) / "layer"), [64, 64], false).unwrap();
    let options = TrainOptions {
        seed: 1,
        steps: STEPS,
        accumulation: 1,
        adapter: AdapterConfig::new(Method::Lora, NonZeroUsize::new(16).unwrap(), 16.0).unwrap(),
        optimizer: OptimizerConfig::ADAMW,
        rate: 1e-3,
        up_rate: 1.0,
        schedule: Schedule::default(),
        clip: Some(1.0),
        ema: Some(0.9),
        graphs: false,
    };
    Trainer::new(&Torch::CPU, Toy { layer }, &mut |_| Some(Target::default()), options).unwrap()
}

/// Trains from the newest checkpoint on, saving after every step, up to `limit` steps.
fn train(folder: &Path, limit: u64) -> Trainer<Toy> {
    let checkpoints = Checkpoints::new(folder, 2);
    checkpoints.sweep().unwrap();
    let mut trainer = trainer();
    trainer.resume(&checkpoints, BTreeMap::new()).unwrap();
    while trainer.steps_done() < limit {
        trainer.step().unwrap();
        trainer.save(&checkpoints, BTreeMap::new(), serde_json::Value::Null, |_| Ok(())).unwrap();
    }
    trainer
}

fn bits(trainer: &Trainer<Toy>, average: bool) -> Vec<u32> {
    let mut bits = Vec::new();
    for named in trainer.adapters(average).unwrap() {
        named
            .adapter
            .map(&mut |_, tensor| {
                let values: Vec<f32> = Vec::try_from(tensor.flatten(0, -1)).unwrap();
                bits.extend(values.into_iter().map(f32::to_bits));
                Ok(())
            })
            .unwrap();
    }
    bits
}

/// The victim; without its folder it has nothing to do.
#[test]
fn victim() {
    tch::set_num_threads(1);
    if let Some(folder) = std::env::var_os(FOLDER) {
        train(Path::new(&folder), STEPS);
    }
}

#[test]
fn a_run_that_is_killed_at_random_is_the_undisturbed_run() {
    tch::set_num_threads(1);
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::new(folder.path(), 2);
    let mut draw = Draw::new(8, Purpose::Sample, 0, 0);
    let mut reached = 0;
    for round in 0..KILLS {
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "victim", "--test-threads=1"])
            .env(FOLDER, folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // It is let alone until it has saved something new, so that each round gets further.
        let newest = || checkpoints.newest().ok().flatten().map_or(0, |found| found.state.step);
        let mut waited = 0;
        while newest() <= reached && waited < 3000 {
            thread::sleep(Duration::from_millis(20));
            waited += 1;
        }
        thread::sleep(Duration::from_micros(u64::from(draw.below(40_000))));
        victim.kill().unwrap(); // SIGKILL
        victim.wait().unwrap();
        let found = checkpoints.newest().unwrap().expect("a checkpoint");
        assert!(found.state.step > reached, "round {round} stands still at {reached}");
        assert!(found.skipped.is_empty(), "an incomplete checkpoint has a checkpoint's name: {:?}", found.skipped);
        reached = found.state.step;
    }
    let disturbed = train(folder.path(), reached + 5);
    assert!(std::fs::read_dir(folder.path()).unwrap().count() == 2, "remains of killed processes are left");

    let mut whole = trainer();
    for _ in 0..reached + 5 {
        whole.step().unwrap();
    }
    for average in [false, true] {
        assert_eq!(bits(&disturbed, average), bits(&whole, average));
    }
}

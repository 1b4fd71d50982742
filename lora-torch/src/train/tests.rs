//! The loop on a toy: two layers, a target that a low-rank change can reach.

use std::{cell::Cell, collections::BTreeMap, num::NonZeroUsize};

use lora_core::{AdapterConfig, Draw, Init, Method, Purpose};
use tch::Kind;

use super::*;
use crate::{
    Batch, Model, Projection, Weights,
    checkpoint::Checkpoints,
    random,
    schedule::{Decay, Schedule},
};

/// Learns `x ↦ tanh(x·Wᵀ)·Vᵀ` with other matrices than its own.
#[derive(Debug)]
struct Toy {
    layers: Vec<Projection>,
    wanted: Vec<Tensor>,
    examples: i64,
    /// Steps whose loss is not a number.
    broken: Vec<u64>,
    step: Cell<u64>,
    /// How many copies it gives to threads.
    replicas: usize,
}

impl Toy {
    fn new() -> Self {
        Self::on(&Torch::CPU)
    }

    fn on(on: &Torch) -> Self {
        let matrix = |sample| random::normal(&mut Draw::new(9, Purpose::Init, 1, sample), &[6, 6]).unwrap();
        let weights = Weights::from_tensors([
            ("first.weight".to_owned(), matrix(0)),
            ("first.bias".to_owned(), random::normal(&mut Draw::new(9, Purpose::Init, 2, 0), &[6]).unwrap()),
            ("second.weight".to_owned(), matrix(1)),
        ]);
        let root = weights.root(on);
        let layers = vec![
            Projection::linear(&(&root / "first"), [6, 6], true).unwrap(),
            Projection::linear(&(&root / "second"), [6, 6], false).unwrap(),
        ];
        Self {
            layers,
            wanted: vec![matrix(2), matrix(3)],
            examples: 8,
            broken: Vec::new(),
            step: Cell::new(0),
            replicas: 0,
        }
    }
}

impl Model for Toy {
    fn loss(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let x = &inputs[0];
        let kind = self.layers[0].backend().kind;
        let wanted = x.f_linear(&self.wanted[0], None::<&Tensor>)?.f_tanh()?;
        let wanted = wanted.f_linear(&self.wanted[1], None::<&Tensor>)?;
        let y = self.layers[1].forward(&self.layers[0].forward(&x.f_to_kind(kind)?)?.f_tanh()?)?;
        let loss = y.f_to_kind(Kind::Float)?.f_mse_loss(&wanted, tch::Reduction::Mean)?;
        if self.broken.contains(&self.step.get()) { Ok(loss.f_mul_scalar(f64::NAN)?) } else { Ok(loss) }
    }

    fn projections(&mut self) -> Vec<&mut Projection> {
        self.layers.iter_mut().collect()
    }
}

impl Objective for Toy {
    fn batch(&self, step: u64, micro: u64) -> Result<Batch> {
        self.step.set(step);
        let mut draw = Draw::new(4, Purpose::Noise, step, micro as u32);
        let x = random::normal(&mut draw, &[self.examples as usize, 6])?;
        Ok(Batch { bucket: 0, inputs: vec![x], examples: self.examples as usize })
    }

    fn replicas(&mut self) -> Vec<Box<dyn Model + Send>> {
        (0..self.replicas).map(|_| Box::new(Self::new()) as Box<dyn Model + Send>).collect()
    }
}

fn options() -> TrainOptions {
    TrainOptions {
        seed: 5,
        steps: 12,
        accumulation: 1,
        adapter: AdapterConfig::new(Method::Lora, NonZeroUsize::new(3).unwrap(), 1.5).unwrap(),
        optimizer: OptimizerConfig::ADAMW,
        rate: 2e-2,
        up_rate: 1.0,
        schedule: Schedule { decay: Decay::Cosine, warmup: 2 },
        clip: Some(1.0),
        ema: None,
        graphs: true,
    }
}

fn trainer(toy: Toy, options: TrainOptions) -> Trainer<Toy> {
    let mut select = |projection: &Projection| {
        Some(Target { rate: if projection.path() == "first" { 1.0 } else { 0.5 }, start: None })
    };
    Trainer::new(&Torch::CPU, toy, &mut select, options).unwrap()
}

fn run(trainer: &mut Trainer<Toy>, steps: u64) -> Vec<Report> {
    (0..steps).flat_map(|_| trainer.step().unwrap()).collect()
}

fn bits(trainer: &Trainer<Toy>) -> Vec<u32> {
    let mut flats = vec![trainer.device.arena.values().unwrap()];
    flats.extend(trainer.device.average.iter().map(Tensor::shallow_clone));
    flats.extend(trainer.device.rule.state().iter().map(|(_, tensor)| tensor.shallow_clone()));
    flats.iter().flat_map(|flat| host_values(flat).unwrap()).map(f32::to_bits).collect()
}

#[test]
fn the_loss_falls_and_the_schedule_is_reported() {
    let mut trainer = trainer(Toy::new(), TrainOptions { steps: 150, ..options() });
    let reports = run(&mut trainer, 150);
    assert_eq!((reports.len(), reports[0].rate, reports[0].step), (150, 0.0, 1));
    let mean = |part: &[Report]| part.iter().map(|report| report.loss).sum::<f64>() / part.len() as f64;
    assert!(mean(&reports[140..]) < 0.5 * mean(&reports[..10]), "{} {}", mean(&reports[..10]), mean(&reports[140..]));
    assert!(trainer.is_finished() && trainer.step().unwrap().is_empty());
}

/// Three steps of AdamW written out per number (Loshchilov and Hutter 2019, algorithm 2), with gradients from the model.
#[test]
fn lora_plus_multiplies_the_rate_of_up_and_of_nothing_else() {
    const RATIO: f64 = 16.0;
    let mut config = options().adapter;
    config.method = Method::Dora; // has magnitudes besides
    let schedule = Schedule { decay: Decay::Constant, warmup: 0 };
    let options = TrainOptions { up_rate: RATIO, adapter: config, clip: None, schedule, ..options() };
    let mut trainer = trainer(Toy::new(), options);
    let lines = trainer.trained.layout(&trainer.device.arena).unwrap();
    let rate = |line: &str| {
        let of_module = if line.starts_with("first") { 2e-2 } else { 1e-2 };
        if line.contains(".Up ") { of_module * RATIO } else { of_module }
    };
    let rates: Vec<f64> = lines.iter().map(|line| rate(line)).collect();
    assert_eq!((rates.len(), trainer.device.arena.groups().len()), (6, 4), "{lines:?}");
    let parts = |trainer: &Trainer<Toy>, flat: &Tensor| -> Vec<Vec<f64>> {
        let parts = trainer.device.arena.split(flat).unwrap();
        parts.iter().map(|part| values(&part.f_detach().unwrap().f_contiguous().unwrap())).collect()
    };
    let start = trainer.device.arena.values().unwrap();
    let mut expected = parts(&trainer, &start);
    let mut moments: Vec<Vec<[f64; 2]>> = expected.iter().map(|part| vec![[0.0; 2]; part.len()]).collect();
    for step in 1..=3 {
        let batch = trainer.objective.batch(step - 1, 0).unwrap();
        trainer.trained.attach(&mut trainer.objective, &trainer.device.arena).unwrap();
        let loss = trainer.objective.loss(&batch.inputs).unwrap();
        let flat = trainer.device.arena.gradient(&loss).unwrap();
        for (((part, gradient), rate), moments) in
            expected.iter_mut().zip(parts(&trainer, &flat)).zip(&rates).zip(&mut moments)
        {
            for ((value, g), [m, v]) in part.iter_mut().zip(gradient).zip(moments) {
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.999 * *v + 0.001 * g * g;
                let (m_hat, v_hat) = (*m / (1.0 - 0.9_f64.powi(step as i32)), *v / (1.0 - 0.999_f64.powi(step as i32)));
                *value -= rate * (m_hat / (v_hat.sqrt() + 1e-8) + 0.01 * *value);
            }
        }
        run(&mut trainer, 1);
        let now = trainer.device.arena.values().unwrap();
        for (line, (now, expected)) in lines.iter().zip(parts(&trainer, &now).iter().zip(&expected)) {
            let error = now.iter().zip(expected).map(|(now, expected)| (now - expected).abs()).fold(0.0, f64::max);
            assert!(error < 1e-5, "step {step}, {line}: {error:e}");
        }
    }
}

#[test]
fn a_resumed_run_is_the_same_run_bit_for_bit_with_every_rule() {
    let rules = [
        OptimizerConfig::ADAMW,
        OptimizerConfig::LION,
        OptimizerConfig::ADAFACTOR,
        OptimizerConfig::PRODIGY,
        OptimizerConfig::Sgd { momentum: 0.9, nesterov: true, weight_decay: 0.01 },
    ];
    for optimizer in rules {
        for (method, init) in [(Method::Lora, Init::Pissa), (Method::Lokr, Init::Kaiming)] {
            let mut config = AdapterConfig::new(method, NonZeroUsize::new(2).unwrap(), 2.0).unwrap();
            config.init = init;
            let options = TrainOptions { optimizer, adapter: config, accumulation: 2, ema: Some(0.99), ..options() };
            let folder = tempfile::tempdir().unwrap();
            let checkpoints = Checkpoints::new(folder.path(), 2);
            let identity = || BTreeMap::from([("base".to_owned(), "toy".to_owned())]);

            let mut whole = trainer(Toy::new(), options.clone());
            run(&mut whole, 12);
            let mut first = trainer(Toy::new(), options.clone());
            run(&mut first, 5);
            first.save(&checkpoints, identity(), serde_json::json!({"at": 5}), |_| Ok(())).unwrap();
            run(&mut first, 3); // lost when the process dies
            let mut second = trainer(Toy::new(), options.clone());
            let resumed = second.resume(&checkpoints, identity()).unwrap().unwrap();
            assert_eq!((resumed.step, &resumed.extra["at"]), (5, &serde_json::json!(5)));
            let reports = run(&mut second, 7);
            assert_eq!(reports[0].step, 6);
            assert_eq!(bits(&second), bits(&whole), "{optimizer:?} {method:?}");
        }
    }
}

#[test]
fn a_batch_shared_out_over_threads_gives_the_same_training() {
    let config = |init| AdapterConfig { init, ..options().adapter };
    for (examples, init) in [(8, Init::Kaiming), (7, Init::Kaiming), (2, Init::Kaiming), (8, Init::Pissa)] {
        let options = TrainOptions { adapter: config(init), accumulation: 2, ..options() };
        let toy = |replicas| Toy { replicas, examples, ..Toy::new() };
        let [mut whole, mut shared, mut again] = [0, 3, 3].map(|replicas| trainer(toy(replicas), options.clone()));
        assert!(whole.lanes.is_none() && shared.lanes.is_some());
        let pairs = run(&mut whole, 12).into_iter().zip(run(&mut shared, 12));
        for (whole, shared) in pairs {
            let near = |a: f64, b: f64| (a - b).abs() <= 2e-5 * a.abs();
            assert!(near(whole.loss, shared.loss), "{whole:?} {shared:?}");
            assert!(near(whole.gradient_norm, shared.gradient_norm), "{whole:?} {shared:?}");
        }
        run(&mut again, 12);
        assert_eq!(bits(&shared), bits(&again), "the same threads, the same bits");
    }
}

#[test]
fn a_thread_that_cannot_go_on_ends_the_step_and_not_the_program() {
    let mut trainer = trainer(Toy { replicas: 2, ..Toy::new() }, options());
    run(&mut trainer, 1);
    let arena = &trainer.device.arena;
    let inputs = [Tensor::f_zeros([4, 5], (Kind::Float, Device::Cpu)).unwrap()]; // the layers take 6
    let lanes = trainer.lanes.as_ref().unwrap();
    assert!(lanes.run(&inputs, None).is_err());
    let inputs = [Tensor::f_ones([4, 6], (Kind::Float, Device::Cpu)).unwrap()];
    assert_eq!(lanes.run(&inputs, None).unwrap().gradient.size(), arena.zeros().unwrap().size());
}

#[test]
fn a_checkpoint_of_another_run_is_refused_with_the_difference() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::new(folder.path(), 2);
    let identity = |base: &str| BTreeMap::from([("base".to_owned(), base.to_owned())]);
    let mut one = trainer(Toy::new(), options());
    run(&mut one, 1);
    one.save(&checkpoints, identity("a"), serde_json::Value::Null, |_| Ok(())).unwrap();
    let other = TrainOptions { seed: 6, ..options() };
    let message = trainer(Toy::new(), other).resume(&checkpoints, identity("b")).unwrap_err().to_string();
    assert!(message.contains("base was `a`, now `b`") && message.contains("seed was `5`, now `6`"), "{message}");
}

#[test]
fn broken_steps_change_nothing_and_three_in_a_row_stop_the_run() {
    let mut trainer = trainer(Toy { broken: vec![3, 4, 6, 7, 8], ..Toy::new() }, options());
    run(&mut trainer, 3);
    let before = bits(&trainer);
    let reports = run(&mut trainer, 2);
    assert!(reports.iter().all(|report| !report.applied && report.loss.is_nan()));
    assert_eq!(bits(&trainer), before);
    assert!(run(&mut trainer, 1)[0].applied);
    let before = bits(&trainer);
    run(&mut trainer, 2);
    assert!(matches!(trainer.step(), Err(Error::NotFinite { step: 9, count: 3 })));
    assert_eq!(bits(&trainer), before);
}

#[test]
fn lower_precision_learns_and_a_broken_step_halves_the_scale_of_a_half_precision_loss() {
    for kind in [Kind::BFloat16, Kind::Half] {
        let on = Torch::CPU.with_kind(kind);
        let toy = Toy { broken: vec![20], ..Toy::on(&on) };
        let mut select = |_: &Projection| Some(Target::default());
        let mut trainer = Trainer::new(&on, toy, &mut select, TrainOptions { steps: 100, ..options() }).unwrap();
        let reports = run(&mut trainer, 100);
        let mean = |part: &[Report]| part.iter().map(|report| report.loss).sum::<f64>() / part.len() as f64;
        assert!(mean(&reports[90..]) < 0.8 * mean(&reports[..10]), "{kind:?}");
        let scale = trainer.device.loss_scale.as_ref().map(|scale| scale.double_value(&[0]));
        assert_eq!(scale, (kind == Kind::Half).then_some(2048.0));
        // The gradient is reported without the scale: of the size that 32 bits give.
        let mut exact = self::trainer(Toy::new(), TrainOptions { steps: 100, ..options() });
        let expected = run(&mut exact, 1)[0].gradient_norm;
        assert!((reports[0].gradient_norm - expected).abs() < 0.05 * expected);
    }
}

#[test]
fn accumulated_gradients_are_the_mean_of_the_micro_steps() {
    // The mean gradient by hand, from two trainers of one micro-step each.
    let gradient_norm = |accumulation, skip: u64| {
        let toy = Toy::new();
        let mut trainer = trainer(toy, TrainOptions { accumulation, steps: 1, clip: None, ..options() });
        if accumulation == 1 {
            let batch = trainer.objective.batch(0, skip).unwrap();
            let (device, objective) = (&mut trainer.device, &mut trainer.objective);
            trainer.trained.attach(objective, &device.arena).unwrap();
            let loss = objective.loss(&batch.inputs).unwrap();
            return device.arena.gradient(&loss).unwrap();
        }
        run(&mut trainer, 1);
        trainer.device.accumulated().unwrap()
    };
    let [first, second] = [gradient_norm(1, 0), gradient_norm(1, 1)];
    let mean = first.f_add(&second).unwrap().f_div_scalar(2.0).unwrap();
    let error = gradient_norm(2, 0).f_sub(&mean).unwrap().f_abs().unwrap().f_max().unwrap().double_value(&[]);
    assert!(error < 1e-6 && mean.f_norm().unwrap().double_value(&[]) > 1e-2, "{error}");
}

#[test]
fn the_moving_average_follows_diffusers_and_can_be_looked_at() {
    let mut trainer = trainer(Toy::new(), TrainOptions { ema: Some(0.25), ..options() });
    let mut expected: Vec<f64> = Vec::new();
    for step in 0..6 {
        run(&mut trainer, 1);
        let now: Vec<f64> = values(&trainer.device.arena.values().unwrap());
        let decay = if step == 0 { 0.0 } else { ((1.0 + f64::from(step)) / (10.0 + f64::from(step))).min(0.25) };
        if expected.is_empty() {
            expected.clone_from(&now);
        }
        for (average, now) in expected.iter_mut().zip(now) {
            *average = decay * *average + (1.0 - decay) * now;
        }
    }
    let error = values(trainer.device.average.as_ref().unwrap())
        .iter()
        .zip(&expected)
        .map(|(a, e)| (a - e).abs())
        .fold(0.0, f64::max);
    assert!(error < 1e-6, "{error}");

    let loss = |trainer: &mut Trainer<Toy>, average| {
        trainer.with_adapters(average, |toy| Ok(toy.loss(&toy.batch(0, 0)?.inputs)?.double_value(&[]))).unwrap()
    };
    let batch = trainer.objective().batch(0, 0).unwrap();
    let bare = trainer.objective().loss(&batch.inputs).unwrap().double_value(&[]);
    let (now, average) = (loss(&mut trainer, false), loss(&mut trainer, true));
    assert!(now != average && now != bare && average != bare);
    let named = trainer.adapters(true).unwrap();
    assert_eq!(named.iter().map(|adapter| adapter.path.as_str()).collect::<Vec<_>>(), ["first", "second"]);
}

#[test]
fn options_that_cannot_be_are_refused_by_name() {
    let refused = |options: TrainOptions| {
        let mut select = |_: &Projection| Some(Target::default());
        Trainer::new(&Torch::CPU, Toy::new(), &mut select, options).unwrap_err().to_string()
    };
    assert!(refused(TrainOptions { steps: 0, ..options() }).starts_with("steps"));
    assert!(refused(TrainOptions { accumulation: 0, ..options() }).starts_with("accum"));
    assert!(refused(TrainOptions { rate: f64::NAN, ..options() }).starts_with("lr"));
    assert!(refused(TrainOptions { clip: Some(0.0), ..options() }).starts_with("clip"));
    let plus = || TrainOptions { up_rate: 4.0, ..options() };
    assert!(refused(TrainOptions { up_rate: 0.0, ..options() }).starts_with("lora-plus"));
    assert!(refused(TrainOptions { optimizer: OptimizerConfig::PRODIGY, ..plus() }).starts_with("lora-plus"));
    let mut loha = plus();
    loha.adapter.method = Method::Loha;
    assert!(refused(loha).starts_with("lora-plus"));
    let mut none = |_: &Projection| None;
    let error = Trainer::new(&Torch::CPU, Toy::new(), &mut none, options()).unwrap_err();
    assert!(error.to_string().contains("nothing to train"));
}

fn values(tensor: &Tensor) -> Vec<f64> {
    assert_eq!(tensor.kind(), Kind::Float);
    host_values(tensor).unwrap().into_iter().map(f64::from).collect()
}

//! From a folder of pictures to the batches of a run, with the real models: caches, draws, masks, the first steps.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::{
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use lora_core::{AdapterConfig, Method};
use lora_diffusion::{
    BaseFiles,
    data::{
        Alpha, Cache, CaptionVariation, Dataset, Embedding, Embeddings, LatentOptions, Latents, ScanOptions,
        latents::latents,
    },
    objective::{DiffusionObjective, SampleOptions, Source, TrainingSet},
    schedule::training::Weighting,
    text::Text,
    vae::Vae,
};
use lora_torch::{
    Model, Objective, Target, Torch, TrainOptions, Trainer, optimizer::OptimizerConfig, schedule::Schedule,
};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

fn assets() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets")
}

fn base() -> BaseFiles {
    BaseFiles::find(&assets().join("tiny-sd")).unwrap()
}

/// A copy of some neon pictures with their captions, that a test may change.
fn pictures(count: usize) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for number in 0..count {
        for extension in ["png", "txt"] {
            let name = format!("{number:02}.{extension}");
            fs::copy(assets().join("styles/neon").join(&name), folder.path().join(&name)).unwrap();
        }
    }
    folder
}

fn scan(folder: &Path) -> Dataset {
    Dataset::scan(folder, &ScanOptions::new(128), &|_, _| {}).unwrap()
}

fn encode(dataset: &mut Dataset, vae: &Vae, cache: Option<&Cache>, flip: bool) -> Latents {
    let options = LatentOptions { alpha: Alpha::White, flip, vae: [7; 32], kind: Kind::Float };
    latents(dataset, cache, options, &mut |pixels| vae.encode(pixels), &mut |_, _| {}).unwrap()
}

fn embed(dataset: &Dataset, text: &Text, cache: Option<&Cache>) -> Embeddings {
    let captions = dataset.pictures.iter().map(|picture| &*picture.caption);
    Embeddings::new(captions, cache, [8; 32], "clip skip 0", &mut |captions| {
        let context = text.encode(captions, Device::Cpu)?.context;
        let rows = (0..captions.len() as i64).map(|at| Ok(Embedding { context: context.f_get(at)?, pooled: None }));
        rows.collect()
    })
    .unwrap()
}

fn options() -> SampleOptions {
    SampleOptions {
        seed: 3,
        batch: 2,
        micro_steps: 1,
        timesteps: 0..1000,
        noise_offset: 0.0,
        captions: CaptionVariation::default(),
    }
}

fn training_set(folder: &Path, flip: bool, options: SampleOptions) -> TrainingSet {
    let files = base();
    let (vae, text) = (files.load_vae(&Torch::CPU).unwrap(), files.load_text(&Torch::CPU).unwrap());
    let mut dataset = scan(folder);
    let latents = encode(&mut dataset, &vae, None, flip);
    let embeddings = (!options.captions.changes_words()).then(|| embed(&dataset, &text, None));
    TrainingSet::new(&dataset, latents, embeddings, &files.vae, options).unwrap()
}

fn objective(source: TrainingSet, text: Option<Text>) -> DiffusionObjective<TrainingSet> {
    let files = base();
    let unet = files.load_unet(&Torch::CPU).unwrap();
    DiffusionObjective::new(unet, text, &files.schedule, Weighting::MinSnr(5.0), source).unwrap()
}

#[test]
fn a_cache_computes_what_is_new_and_nothing_else() {
    let folder = pictures(4);
    let vae = base().load_vae(&Torch::CPU).unwrap();
    let text = base().load_text(&Torch::CPU).unwrap();
    let cache = Cache::at(folder.path().join(".cache"));
    let count = |made: &Latents| (made.cached, made.computed);

    let first = encode(&mut scan(folder.path()), &vae, Some(&cache), false);
    let again = encode(&mut scan(folder.path()), &vae, Some(&cache), false);
    assert_eq!((count(&first), count(&again)), ((0, 4), (4, 0)));
    for picture in 0..4 {
        let (a, b) = (first.get(picture, false).unwrap(), again.get(picture, false).unwrap());
        assert!(a.mean == b.mean && a.log_variance == b.log_variance, "the cache gives back what was computed");
    }
    let words = embed(&scan(folder.path()), &text, Some(&cache));
    assert_eq!((words.cached, words.computed), (0, 5), "four captions and the empty one");

    // Another caption: one embedding, no latent.
    fs::write(folder.path().join("02.txt"), "something else").unwrap();
    let dataset = scan(folder.path());
    assert_eq!(count(&encode(&mut dataset.clone(), &vae, Some(&cache), false)), (4, 0));
    let words = embed(&dataset, &text, Some(&cache));
    assert_eq!((words.cached, words.computed), (4, 1));

    // Another picture under an old name: one latent. A new name for an old picture: none.
    fs::copy(assets().join("styles/neon/09.png"), folder.path().join("01.png")).unwrap();
    fs::rename(folder.path().join("03.png"), folder.path().join("renamed.png")).unwrap();
    assert_eq!(count(&encode(&mut scan(folder.path()), &vae, Some(&cache), false)), (3, 1));
    // Mirror images are latents of their own.
    assert_eq!(count(&encode(&mut scan(folder.path()), &vae, Some(&cache), true)), (4, 4));
}

#[test]
fn a_picture_that_goes_away_is_served_from_the_cache_or_skipped() {
    let folder = pictures(3);
    let vae = base().load_vae(&Torch::CPU).unwrap();
    let cache = Cache::at(folder.path().join(".cache"));
    let mut dataset = scan(folder.path());
    encode(&mut dataset.clone(), &vae, Some(&cache), false);
    fs::remove_file(folder.path().join("00.png")).unwrap();
    let made = encode(&mut dataset.clone(), &vae, Some(&cache), false);
    assert_eq!((made.cached, made.len()), (3, 3));

    fs::copy(folder.path().join("02.png"), folder.path().join("01.png")).unwrap();
    let made = encode(&mut dataset, &vae, None, false);
    assert_eq!((made.len(), dataset.pictures.len()), (1, 1));
    let reasons: Vec<&str> = dataset.skipped.iter().map(|file| &*file.reason).collect();
    assert!(reasons[0].contains("cannot read") && reasons[1].contains("changed"), "{reasons:?}");
}

#[test]
fn numbers_that_are_not_finite_stop_before_the_first_step() {
    let folder = pictures(2);
    let vae = base().load_vae(&Torch::CPU).unwrap();
    let mut calls = 0;
    let options = LatentOptions { alpha: Alpha::White, flip: false, vae: [7; 32], kind: Kind::Float };
    let poisoned = latents(
        &mut scan(folder.path()),
        None,
        options,
        &mut |pixels| {
            calls += 1;
            let mut posterior = vae.encode(pixels)?;
            if calls == 2 {
                posterior.mean = posterior.mean.f_mul_scalar(f64::NAN)?;
            }
            Ok(posterior)
        },
        &mut |_, _| {},
    );
    let error = poisoned.unwrap_err().to_string();
    assert!(error.contains("01.png") && error.contains("VAE"), "{error}");
}

#[test]
fn a_batch_is_a_function_of_seed_step_and_micro_step() {
    let folder = pictures(5);
    let (a, b) = (training_set(folder.path(), true, options()), training_set(folder.path(), true, options()));
    let (a, b) = (objective(a, None), objective(b, None));
    for step in [7, 2, 0] {
        let (first, again) = (a.batch(step, 0).unwrap(), b.batch(step, 0).unwrap());
        assert_eq!(first.inputs, again.inputs);
        assert_eq!((first.bucket, first.examples), (again.bucket, 2));
    }
    assert_ne!(a.batch(0, 0).unwrap().inputs[0], a.batch(1, 0).unwrap().inputs[0]);
    let other = training_set(folder.path(), true, SampleOptions { seed: 4, ..options() });
    assert_ne!(objective(other, None).batch(0, 0).unwrap().inputs[0], a.batch(0, 0).unwrap().inputs[0]);
}

#[test]
fn micro_batches_see_what_one_large_batch_sees() {
    let folder = pictures(4);
    let large = training_set(folder.path(), false, SampleOptions { batch: 4, ..options() });
    let small = training_set(folder.path(), false, SampleOptions { batch: 1, micro_steps: 4, ..options() });
    for step in 0..3 {
        let (_, large) = large.examples(step, 0).unwrap();
        for (micro, large) in large.iter().enumerate() {
            let (_, small) = small.examples(step, micro as u64).unwrap();
            assert!(small[0].latent == large.latent && small[0].noise == large.noise);
            assert_eq!(small[0].timestep, large.timestep);
        }
    }
}

#[test]
fn latents_are_samples_of_the_posterior_scaled() {
    let folder = pictures(1);
    let files = base();
    let vae = files.load_vae(&Torch::CPU).unwrap();
    let mut dataset = scan(folder.path());
    let made = encode(&mut dataset, &vae, None, false);
    let made = made.get(0, false).unwrap();
    let wanted = vae.scale(&made.mean).unwrap();
    let deviation = made.log_variance.f_exp().unwrap().f_mean(Kind::Float).unwrap();
    let deviation = deviation.f_double_value(&[]).unwrap().sqrt() * files.vae.scaling_factor;
    let set = training_set(folder.path(), false, options());
    let samples: Vec<Tensor> = (0..200).map(|step| set.examples(step, 0).unwrap().1.remove(0).latent).collect();
    let samples = Tensor::f_stack(&samples, 0).unwrap();
    let mean = samples.f_mean_dim([0i64].as_slice(), false, Kind::Float).unwrap();
    let off = mean.f_sub(&wanted).unwrap().f_square().unwrap().f_mean(Kind::Float).unwrap();
    let spread = samples.f_sub(&wanted).unwrap().f_square().unwrap().f_mean(Kind::Float).unwrap();
    let (off, spread) = (off.f_double_value(&[]).unwrap().sqrt(), spread.f_double_value(&[]).unwrap().sqrt());
    assert!(off < deviation / 10.0, "mean of the samples is {off} from the posterior's, deviation {deviation}");
    assert!((spread / deviation - 1.0).abs() < 0.05, "samples deviate by {spread}, expected {deviation}");
}

#[test]
fn options_reach_the_examples() {
    let folder = pictures(2);
    let captions = CaptionVariation { dropout: 0.3, ..Default::default() };
    let plain = training_set(folder.path(), false, options());
    let set = training_set(
        folder.path(),
        false,
        SampleOptions { timesteps: 100..300, noise_offset: 0.5, captions, ..options() },
    );
    let empty = set.fixed(0, 5).unwrap();
    let mut dropped = 0;
    let mut channels = Vec::new();
    for step in 0..200 {
        let (_, examples) = set.examples(step, 0).unwrap();
        let (_, without) = plain.examples(step, 0).unwrap();
        for (example, without) in examples.iter().zip(&without) {
            assert!((100..300).contains(&example.timestep));
            let offset = example.noise.f_sub(&without.noise).unwrap();
            let first = offset.f_get(0).unwrap();
            let constant = first.f_sub(&first.f_mean(Kind::Float).unwrap()).unwrap().f_abs().unwrap();
            assert!(constant.f_max().unwrap().f_double_value(&[]).unwrap() < 1e-5, "one number a channel");
            channels.push(first.f_double_value(&[0, 0]).unwrap());
            let words = |example: &lora_diffusion::objective::Example| match &example.words {
                lora_diffusion::objective::Words::Embedded { context, .. } => context.shallow_clone(),
                lora_diffusion::objective::Words::Caption(_) => panic!("embeddings were made"),
            };
            dropped += usize::from(words(example) != words(without));
        }
    }
    assert!((90..150).contains(&dropped), "{dropped} of 400 captions dropped");
    let deviation = (channels.iter().map(|offset| offset * offset).sum::<f64>() / channels.len() as f64).sqrt();
    assert!((deviation - 0.5).abs() < 0.06, "{deviation}");
    assert_eq!(empty.timestep, 5, "evaluation goes where it is told");
}

#[test]
fn masks_and_weights_scale_the_loss() {
    let folder = pictures(2);
    fs::create_dir(folder.path().join("masks")).unwrap();
    image::GrayImage::new(128, 128).save(folder.path().join("masks/00.png")).unwrap();
    let set = training_set(folder.path(), false, SampleOptions { batch: 1, ..options() });
    assert!(set.masked());
    let mut objective = objective(set, None);
    assert!(!objective.projections().is_empty());
    let loss = |picture: usize, weight: f64| {
        let mut example = objective.source().fixed(picture, 400).unwrap();
        example.weight = weight;
        let inputs = objective.inputs(&[example]).unwrap();
        objective.loss(&inputs).unwrap().f_double_value(&[]).unwrap()
    };
    assert_eq!(loss(0, 1.0), 0.0, "everything of the first picture is masked");
    let whole = loss(1, 1.0);
    assert!(whole > 0.0 && (loss(1, 0.25) / whole - 0.25).abs() < 1e-6);
}

#[test]
fn captions_that_change_are_encoded_within_the_step() {
    let folder = pictures(3);
    for number in 0..3 {
        fs::write(folder.path().join(format!("{number:02}.txt")), "a cat, red, in neon style, glowing").unwrap();
    }
    let frozen = objective(training_set(folder.path(), false, options()), None);
    let captions = CaptionVariation { shuffle: true, keep_tokens: 4, ..Default::default() };
    let set = training_set(folder.path(), false, SampleOptions { captions, ..options() });
    let text = base().load_text(&Torch::CPU).unwrap();
    let mut within = objective(set, Some(text));
    // With all four parts kept in place the words are the same, and so must be the loss.
    let loss = |objective: &DiffusionObjective<TrainingSet>| {
        let inputs = objective.batch(4, 0).unwrap().inputs;
        objective.loss(&inputs).unwrap().f_double_value(&[]).unwrap()
    };
    let (frozen, inside) = (loss(&frozen), loss(&within));
    assert!((frozen / inside - 1.0).abs() < 1e-5, "{frozen} and {inside}");
    let paths: Vec<String> = within.projections().iter().map(|projection| projection.path().to_owned()).collect();
    assert!(paths.iter().any(|path| path.contains("text_model") || path.contains("self_attn")), "{paths:?}");
}

#[test]
fn a_few_steps_on_a_style_lower_the_loss() {
    let folder = pictures(8);
    let objective = objective(training_set(folder.path(), false, SampleOptions { batch: 4, ..options() }), None);
    let evaluate = |objective: &DiffusionObjective<TrainingSet>| -> lora_torch::Result<f64> {
        let mut sum = 0.0;
        for picture in 0..8 {
            let example = objective.source().fixed(picture, 250).unwrap();
            sum += objective.loss(&objective.inputs(&[example]).unwrap())?.f_double_value(&[])?;
        }
        Ok(sum / 8.0)
    };
    let run = TrainOptions {
        seed: 1,
        steps: 30,
        accumulation: 1,
        adapter: AdapterConfig::new(Method::Lora, NonZeroUsize::new(8).unwrap(), 8.0).unwrap(),
        optimizer: OptimizerConfig::ADAMW,
        rate: 2e-3,
        up_rate: 1.0,
        schedule: Schedule::default(),
        clip: Some(1.0),
        ema: None,
        graphs: false,
    };
    let attention = |path: &str| [".to_q", ".to_k", ".to_v", ".to_out.0"].iter().any(|end| path.ends_with(end));
    let mut select = |projection: &lora_torch::Projection| attention(projection.path()).then(Target::default);
    let mut trainer = Trainer::new(&Torch::CPU, objective, &mut select, run).unwrap();
    let before = trainer.with_adapters(false, |objective| evaluate(objective)).unwrap();
    while !trainer.is_finished() {
        trainer.step().unwrap();
    }
    let after = trainer.with_adapters(false, |objective| evaluate(objective)).unwrap();
    assert!(after < 0.9 * before, "fixed-noise loss went from {before} to {after}");
}

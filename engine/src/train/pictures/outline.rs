//! What is said of a run on pictures before it starts.

use lora_cli::{
    options::TrainConfig,
    plan::{Bucket, DataPlan, Skipped},
    text,
};
use lora_core::format::Component;
use lora_diffusion::{
    data::{Dataset, Order},
    unet::UnetConfig,
};

use super::{FoundPictures, Pictures};
use crate::{
    base,
    train::{
        Family as _, Known,
        plan::{Outline, kind_bytes, weights},
    },
};

impl FoundPictures {
    /// What this family adds to the plan.
    pub(super) fn in_plan(&self, known: &Known) -> Outline<'_> {
        let Self { files, dataset, side, .. } = self;
        let Known { config, names, machine, .. } = known;
        let order = order(dataset, config);
        let batch = order.as_ref().map_or(0, Order::batch_size) as u64;
        let kind = kind_bytes(machine.on.kind);
        let stored = |component, bytes: u64| weights(names, component, None, bytes)[0];
        let [unet, largest] = weights(names, Component::Unet, files.quantise, kind);
        let latent = (u64::from(*side) / files.vae.factor() as u64).pow(2);
        let pictures = dataset.pictures.len() as u64 * if config.flip { 2 } else { 1 };
        let words = 77 * files.unet.cross_attention_dim as u64 * dataset.pictures.len() as u64;
        Outline {
            validates: config.validation > 0.0,
            base_kind: base::describe(files, names),
            data: data(dataset, config, batch),
            batch,
            weights: unet
                + stored(Component::TextEncoder, kind)
                + stored(Component::TextEncoder2, kind)
                + stored(Component::Vae, 4),
            activations: activations(&files.unet, latent, batch) * kind + largest,
            cache: (pictures * latent * 2 * files.vae.latent_channels as u64 + words) * 4,
            prepare: prepare_seconds(dataset, config, *side),
            file_number: Pictures::DTYPE.size() as u64,
            steps_in: Box::new(move |epochs| order.as_ref().map_or(epochs, |order| order.steps(epochs))),
        }
    }
}

fn order(dataset: &Dataset, config: &TrainConfig) -> Option<Order> {
    let sizes = dataset.pictures.iter().map(|picture| (picture.fit.bucket, picture.repeats));
    Some(Order::new(sizes, config.batch.get(), config.seed)?.accumulating(config.accum.get()))
}

fn data(dataset: &Dataset, config: &TrainConfig, batch: u64) -> DataPlan {
    let mut buckets: Vec<Bucket> = Vec::new();
    for picture in dataset.pictures.iter().filter(|picture| picture.repeats > 0) {
        let [width, height] = picture.fit.bucket;
        match buckets.iter_mut().find(|bucket| (bucket.width, bucket.height) == (width, height)) {
            Some(bucket) => bucket.count += 1,
            None => buckets.push(Bucket { width, height, count: 1 }),
        }
    }
    buckets.sort_by_key(|bucket| std::cmp::Reverse(bucket.count));
    let skipped =
        dataset.skipped.iter().map(|file| Skipped { path: dataset.root.join(&file.path), reason: file.reason.clone() });
    let mut notes: Vec<String> = dataset.notes.iter().map(|note| note.message.clone()).collect();
    let kept = dataset.kept_apart().count();
    if kept > 0 {
        notes.push(format!("{} kept for validation", text::plural(kept as u64, "picture")));
    }
    if batch < config.batch.get() as u64 {
        notes.push(format!("batch {} cut down to {batch}, since no size has more pictures", config.batch));
    }
    DataPlan {
        source: dataset.root.clone(),
        layout: dataset.layout.clone(),
        unit: "picture".into(),
        used: (dataset.pictures.len() - kept) as u64,
        skipped: skipped.collect(),
        notes,
        buckets,
    }
}

/// Numbers that the backward pass of the UNet needs of its forward pass.
///
/// Per layer and position about ten times the channels in a resnet and twenty-four times in a transformer block. This
/// meets the traced 0.81 GB of SD 1.5 (512 px, bf16) and 5.6 GB of SDXL (1024 px) within a tenth.
fn activations(unet: &UnetConfig, latent: u64, batch: u64) -> u64 {
    let levels = unet.block_out_channels.iter().enumerate();
    let sum: u64 = levels
        .map(|(level, channels)| {
            let positions = latent >> (2 * level as u32);
            let attends = unet
                .down_block_types
                .get(level)
                .is_some_and(|kind| *kind == lora_diffusion::unet::LevelKind::CrossAttention);
            let depth = if attends { unet.transformer_layers_per_block.at(level).unwrap_or(1) as u64 } else { 0 };
            let layers = 2 * unet.layers_per_block as u64 + 1;
            positions * *channels as u64 * layers * (10 + 24 * depth)
        })
        .sum();
    sum * batch.max(1)
}

/// A guess for machines like today's: a hundred megapixels a second are decoded, a tenth of that is encoded on a CPU.
fn prepare_seconds(dataset: &Dataset, config: &TrainConfig, side: u32) -> f64 {
    let pixels = dataset.pictures.len() as f64 * f64::from(side).powi(2) * if config.flip { 2.0 } else { 1.0 };
    pixels / 2e6
}

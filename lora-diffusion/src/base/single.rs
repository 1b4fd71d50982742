//! A checkpoint in a single file, in the layout of the original programs.
//!
//! The file says which of the three models it is; what it cannot say, the published configurations do.

use std::path::Path;

use lora_core::format::{Changed, Component, Family, TensorFile, checkpoint::Checkpoint};
use lora_torch::Weights;

use super::{BaseFiles, Place, not_a_base, tensors};
use crate::{
    Result,
    clip::ClipConfig,
    schedule::{Prediction, ScheduleConfig},
    tokenizer::{Padding, Tokenizer},
    unet::UnetConfig,
    vae::VaeConfig,
};

/// An open checkpoint and its map.
#[derive(Debug)]
pub(super) struct Single {
    file: TensorFile,
    map: Checkpoint,
}

pub(super) fn find(path: &Path) -> Result<BaseFiles> {
    let end = path.extension().and_then(|end| end.to_str()).unwrap_or_default();
    if ["ckpt", "pt", "pth", "bin"].contains(&end) {
        return Err(not_a_base(path, "a pickle, which may run code; convert it to safetensors"));
    }
    let file = TensorFile::open(path)?;
    let Some(map) = Checkpoint::of(&file)? else {
        return Err(not_a_base(path, what_is_it(&file)));
    };
    let family = map.family().clone();
    let (mut unet, vae, text) = match family {
        Family::Sd1 => (UnetConfig::sd_v1_5(), VaeConfig::default(), vec![ClipConfig::vit_l()]),
        Family::Sd2 => (UnetConfig::sd_v2_1(), VaeConfig::default(), vec![ClipConfig::vit_h()]),
        Family::Sdxl => (UnetConfig::sdxl(), VaeConfig::sdxl(), vec![ClipConfig::vit_l(), ClipConfig::vit_big_g()]),
        other => return Err(not_a_base(path, format!("a {other}, which draws no pictures"))),
    };
    for component in [Component::Unet, Component::Vae, Component::TextEncoder] {
        if !map.components().any(|there| there == component) {
            return Err(not_a_base(path, format!("holds no {}, so it is no whole checkpoint", component.name())));
        }
    }
    if let Some([_, channels, _, _]) = map.source(Component::Unet, "conv_in.weight").map(|source| &source.shape[..]) {
        unet.in_channels = *channels; // inpainting bases have 9
    }
    let schedule = schedule(&file, &family);
    if schedule.prediction_type == Prediction::Epsilon && family == Family::Sd2 {
        unet.sample_size = 64; // the base version of SD 2 draws 512 pixels, the other one 768
    }
    let zero_negative = family == Family::Sdxl;
    let place = Place::Single(Box::new(Single { file, map }));
    Ok(BaseFiles {
        path: path.into(),
        family,
        unet,
        vae,
        text,
        schedule,
        zero_negative,
        place,
        quantise: None,
        changed: Changed::new(),
    })
}

impl Single {
    pub(super) fn weights(&self, component: Component) -> Result<Weights> {
        let sources = self.map.tensors(component);
        let named = sources.map(|(name, source)| Ok((name.to_owned(), tensors::read(&self.file, source)?)));
        Ok(Weights::from_tensors(named.collect::<Result<Vec<_>>>()?))
    }

    /// The files carry no vocabulary; all published models use OpenAI's.
    pub(super) fn tokenizer(&self, component: Component) -> Result<Tokenizer> {
        Tokenizer::openai(match (self.map.family(), component) {
            (Family::Sd2, _) | (_, Component::TextEncoder2) => Padding::Zero,
            _ => Padding::End,
        })
    }
}

/// The weights of one component of a checkpoint, under the names of diffusers.
///
/// # Errors
/// If the file is no such checkpoint.
pub fn checkpoint_weights(path: &Path, component: Component) -> Result<Weights> {
    let file = TensorFile::open(path)?;
    match Checkpoint::of(&file)? {
        Some(map) => Single { file, map }.weights(component),
        None => Err(not_a_base(path, what_is_it(&file))),
    }
}

/// The schedule, with what the network predicts as far as the file tells.
///
/// Whether an SD 2 model predicts velocity cannot be seen from its tensors: the version for 768 pixels does, and is taken
/// unless the metadata say otherwise. Some SDXL derivatives mark themselves by empty tensors `v_pred` and `ztsnr`.
fn schedule(file: &TensorFile, family: &Family) -> ScheduleConfig {
    let said = ["modelspec.prediction_type", "ss_v2_prediction"].iter().find_map(|key| file.metadata().get(*key));
    let marked = |name: &str| file.info(name).is_some();
    let prediction = match said.map(String::as_str) {
        Some("v" | "v_prediction") => Prediction::V,
        Some("epsilon") => Prediction::Epsilon,
        _ if marked("v_pred") || *family == Family::Sd2 => Prediction::V,
        _ => Prediction::Epsilon,
    };
    ScheduleConfig { rescale_betas_zero_snr: marked("ztsnr"), ..ScheduleConfig::stable_diffusion(prediction) }
}

/// Why a file is no base, by what it holds instead.
fn what_is_it(file: &TensorFile) -> String {
    let any = |part: &str| file.names().any(|name| name.contains(part));
    if any("lora_") || any("lora.down") || any("hada_") || any("lokr_") {
        return "an adapter, not a base model; give it with `--lora` and the model that it was made for with `--base`"
            .into();
    }
    if any("model.layers.0.") {
        return "one file of a language model, not a Stable Diffusion checkpoint".into();
    }
    if any("down_blocks.") {
        return "one component of a diffusers model; give the folder that holds `model_index.json`".into();
    }
    "not a Stable Diffusion checkpoint: no tensor begins with `model.diffusion_model.`".into()
}

//! A base model: found, described, and loaded part by part.
//!
//! [`BaseFiles::find`] looks at names, headers and configurations only, which takes milliseconds; its methods load the
//! parts. A base is a diffusers folder (`folder`) or a checkpoint in a single file (`single`).

mod folder;
mod single;
mod tensors;

pub use single::checkpoint_weights;

use std::path::{Path, PathBuf};

use lora_core::{
    Backend,
    format::{BaseModel, Changed, Component, Family},
};
use lora_torch::{Torch, Weights, nf4::Scheme};
use tch::Kind;

use crate::{
    Error, Result,
    clip::{Clip, ClipConfig},
    schedule::{Prediction, ScheduleConfig},
    text::{Text, TextPart},
    tokenizer::Tokenizer,
    unet::{Addition, Unet, UnetConfig},
    vae::{Vae, VaeConfig},
};

/// A base model whose configurations have been read and whose weights have not.
#[derive(Debug)]
pub struct BaseFiles {
    /// Where it is.
    pub path: PathBuf,
    /// Which model it is.
    pub family: Family,
    /// The noise predictor.
    pub unet: UnetConfig,
    /// The autoencoder.
    pub vae: VaeConfig,
    /// One or two text encoders.
    pub text: Vec<ClipConfig>,
    /// The noise schedule, with what the network predicts.
    pub schedule: ScheduleConfig,
    /// Whether a missing negative prompt means zeros (SDXL) instead of the empty prompt.
    pub zero_negative: bool,
    /// How the linear layers of the noise predictor are quantised while they are loaded, if they are.
    pub quantise: Option<Scheme>,
    place: Place,
    changed: Changed,
}

#[derive(Debug)]
enum Place {
    Folder,
    Single(Box<single::Single>),
}

impl BaseFiles {
    /// Looks at a diffusers folder or a `.safetensors` checkpoint.
    ///
    /// # Errors
    /// If there is nothing, or something that is no Stable Diffusion base; the reason says what was looked for.
    pub fn find(path: &Path) -> Result<Self> {
        if path.is_dir() {
            folder::find(path)
        } else if path.is_file() {
            single::find(path)
        } else {
            Err(not_a_base(path, "there is no such file or folder"))
        }
    }

    /// Loads the noise predictor, in the kind that `on` says.
    ///
    /// # Errors
    /// If weights are missing, left over, or do not fit the configuration.
    pub fn load_unet(&self, on: &Torch) -> Result<Unet> {
        self.build_unet(&self.weights(Component::Unet)?, on)
    }

    /// Loads the noise predictor once and builds it `count` times over the same tensors.
    ///
    /// # Errors
    /// As [`load_unet`](Self::load_unet).
    pub fn load_unets(&self, on: &Torch, count: usize) -> Result<Vec<Unet>> {
        let weights = self.weights(Component::Unet)?.resident(on);
        (0..count).map(|_| self.build_unet(&weights, on)).collect()
    }

    /// Loads the autoencoder, always in f32: in f16 SDXL's overflows, and pictures lose more in bf16 than it saves.
    ///
    /// # Errors
    /// As [`load_unet`](Self::load_unet).
    pub fn load_vae(&self, on: &Torch) -> Result<Vae> {
        let on = on.with_kind(Kind::Float);
        self.build(Component::Vae, &self.weights(Component::Vae)?, |weights| Vae::new(&weights.root(&on), &self.vae))
    }

    /// Loads tokenizers and text encoders.
    ///
    /// # Errors
    /// As [`load_unet`](Self::load_unet), or if a tokenizer is missing.
    pub fn load_text(&self, on: &Torch) -> Result<Text> {
        self.build_text(&self.text_weights()?, on)
    }

    /// Loads tokenizers and text encoders once and builds the encoders `count` times over the same tensors.
    ///
    /// # Errors
    /// As [`load_text`](Self::load_text).
    pub fn load_texts(&self, on: &Torch, count: usize) -> Result<Vec<Text>> {
        let weights = self.text_weights()?.into_iter().map(|(component, weights)| (component, weights.resident(on)));
        let weights: Vec<_> = weights.collect();
        (0..count).map(|_| self.build_text(&weights, on)).collect()
    }

    /// Loads everything.
    ///
    /// # Errors
    /// As the three methods that load the parts.
    pub fn load(self, on: &Torch) -> Result<Base> {
        Ok(Base {
            text: self.load_text(on)?,
            unet: self.load_unet(on)?,
            vae: self.load_vae(on)?,
            schedule: self.schedule.clone(),
            on: *on,
            files: self,
        })
    }

    /// The weights of one component under the names of diffusers (for text encoders with `text_model.`), not yet read.
    ///
    /// # Errors
    /// If the files are missing or broken.
    pub fn weights(&self, component: Component) -> Result<Weights> {
        let weights = match &self.place {
            Place::Folder => folder::weights(&self.path, component)?,
            Place::Single(single) => single.weights(component)?,
        };
        let scheme = self.quantise.filter(|_| component == Component::Unet);
        let mut weights = weights.of(component).quantised(scheme);
        for ((_, name), array) in self.changed.iter().filter(|((changed, _), _)| *changed == component) {
            weights.replace(name.as_str(), Torch::CPU.tensor(&array.values, &array.shape)?);
        }
        Ok(weights)
    }

    /// Puts changed tensors, such as [`merge_into`](crate::adapters::merge_into) makes, in the place of the base's own.
    pub fn change(&mut self, changed: Changed) {
        self.changed.extend(changed);
    }

    /// The same base as adapter files are read against: names and shapes of all its modules.
    ///
    /// # Errors
    /// If its files cannot be read.
    pub fn model(&self) -> Result<BaseModel> {
        Ok(BaseModel::open(&self.path)?)
    }

    /// The files that hold a component's weights, for hashing.
    ///
    /// # Errors
    /// If they are missing.
    pub fn weight_files(&self, component: Component) -> Result<Vec<PathBuf>> {
        match &self.place {
            Place::Folder => folder::weight_files(&self.path.join(component.name())),
            Place::Single(_) => Ok(vec![self.path.clone()]),
        }
    }

    /// The tokenizer of each text encoder, without its weights.
    ///
    /// # Errors
    /// If one is missing.
    pub fn tokenizers(&self) -> Result<Vec<Tokenizer>> {
        let components = [Component::TextEncoder, Component::TextEncoder2];
        self.text.iter().zip(components).map(|(_, component)| self.tokenizer(component)).collect()
    }

    /// Whether it is conditioned on pooled text and sizes.
    pub fn is_sdxl(&self) -> bool {
        self.unet.addition_embed_type == Some(Addition::TextTime)
    }

    /// What the network predicts.
    pub fn prediction(&self) -> Prediction {
        self.schedule.prediction_type
    }

    /// The side of a picture that the base was trained on, in pixels.
    pub fn resolution(&self) -> usize {
        self.unet.sample_size * self.vae.factor()
    }

    fn tokenizer(&self, component: Component) -> Result<Tokenizer> {
        match &self.place {
            Place::Folder => folder::tokenizer(&self.path, component),
            Place::Single(single) => single.tokenizer(component),
        }
    }

    fn build_unet(&self, weights: &Weights, on: &Torch) -> Result<Unet> {
        self.build(Component::Unet, weights, |weights| Unet::new(&weights.root(on), &self.unet))
    }

    fn text_weights(&self) -> Result<Vec<(Component, Weights)>> {
        let components = [Component::TextEncoder, Component::TextEncoder2].into_iter().take(self.text.len());
        components.map(|component| Ok((component, self.weights(component)?))).collect()
    }

    fn build_text(&self, weights: &[(Component, Weights)], on: &Torch) -> Result<Text> {
        let parts = self.text.iter().zip(weights).map(|(config, (component, weights))| {
            let encoder = self.build(*component, weights, |weights| Clip::new(&weights.root(on), config))?;
            Ok(TextPart { tokenizer: self.tokenizer(*component)?, encoder })
        });
        Ok(Text { parts: parts.collect::<Result<_>>()?, clip_skip: 0, sdxl: self.is_sdxl() })
    }

    /// Builds a model of all the weights there are.
    fn build<M>(
        &self,
        component: Component,
        weights: &Weights,
        model: impl FnOnce(&Weights) -> Result<M>,
    ) -> Result<M> {
        let model = model(weights)?;
        self.refuse_unused(component, weights)?;
        Ok(model)
    }

    /// What no layer reads belongs to a network that is not the one built here.
    fn refuse_unused(&self, component: Component, weights: &Weights) -> Result<()> {
        let unused: Vec<&str> = weights.unused().into_iter().filter(|name| !is_harmless(name)).collect();
        match unused[..] {
            [] => Ok(()),
            [first, ..] => {
                let name = component.name();
                let reason =
                    format!("{name}: {} of its tensors belong to no layer, the first is `{first}`", unused.len());
                Err(not_a_base(&self.path, reason))
            }
        }
    }
}

/// A loaded base model.
#[derive(Debug)]
pub struct Base {
    /// From prompts to what the UNet is conditioned on.
    pub text: Text,
    /// The noise predictor.
    pub unet: Unet,
    /// Between pictures and latents.
    pub vae: Vae,
    /// The noise schedule.
    pub schedule: ScheduleConfig,
    /// What is known of it besides its weights.
    pub files: BaseFiles,
    /// Where UNet and text encoders are, and in which kind.
    pub on: Torch,
}

impl Base {
    /// Finds and loads a base.
    ///
    /// # Errors
    /// As [`BaseFiles::find`] and [`BaseFiles::load`].
    pub fn open(path: &Path, on: &Torch) -> Result<Self> {
        BaseFiles::find(path)?.load(on)
    }
}

/// Buffers that older programs saved with the weights and that hold nothing learnt.
fn is_harmless(name: &str) -> bool {
    name.ends_with("position_ids") || name.ends_with("logit_scale")
}

fn not_a_base(path: &Path, reason: impl Into<String>) -> Error {
    Error::NotABase { path: path.into(), reason: reason.into() }
}

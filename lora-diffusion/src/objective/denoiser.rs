//! The networks with the loss that their adapters are trained on: what runs on the device, and on a thread of its own where
//! a batch is shared out over threads.

use lora_torch::{Model, Projection, Projections as _};
use tch::{Kind, Tensor};

use super::lower;
use crate::{
    Error, Result,
    text::{Conditioning, Text},
    unet::{Added, Unet},
};

/// The noise predictor, with the text encoders if they run within the step.
#[derive(Debug)]
pub(super) struct Denoiser {
    pub(super) unet: Unet,
    pub(super) text: Option<Text>,
    /// Whether the last input is a mask.
    pub(super) masked: bool,
}

impl Denoiser {
    /// The loss on the device; `inputs` as [`DiffusionObjective::inputs`](super::DiffusionObjective::inputs) gives them.
    fn weighted_error(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let [noisy, target, timesteps, weights, rest @ ..] = inputs else { return Err(self.too_few(inputs)) };
        let (mask, rest) = match rest {
            [rest @ .., mask] if self.masked => (Some(mask), rest),
            rest => (None, rest),
        };
        let [words @ .., time_ids] = rest else { return Err(self.too_few(inputs)) };
        let conditioning = match (&self.text, words) {
            (Some(text), ids) => text.encode_ids(ids)?,
            (None, [context]) => Conditioning { context: context.shallow_clone(), pooled: None },
            (None, [context, pooled]) => {
                Conditioning { context: context.shallow_clone(), pooled: Some(pooled.shallow_clone()) }
            }
            (None, _) => return Err(self.too_few(inputs)),
        };
        let added = conditioning.pooled.map(|pooled| Added { pooled, time_ids: time_ids.shallow_clone() });
        let prediction = self.unet.forward(noisy, timesteps, &conditioning.context, added.as_ref())?;
        let mut error = prediction.f_to_kind(Kind::Float)?.f_sub(target)?.f_square()?; // [b, c, h, w]
        if let Some(mask) = mask {
            error = error.f_mul(mask)?;
        }
        let each = error.f_mean_dim([1i64, 2, 3].as_slice(), false, Kind::Float)?; // [b]
        Ok(each.f_mul(weights)?.f_mean(Kind::Float)?)
    }

    fn too_few(&self, inputs: &[Tensor]) -> Error {
        Error::Shape { what: "inputs of the loss", actual: vec![inputs.len() as i64], expected: "those of `inputs`" }
    }
}

impl Model for Denoiser {
    fn loss(&self, inputs: &[Tensor]) -> lora_torch::Result<Tensor> {
        self.weighted_error(inputs).map_err(lower)
    }

    fn projections(&mut self) -> Vec<&mut Projection> {
        let mut all = self.unet.projections();
        all.extend(self.text.as_mut().map(|text| text.projections()).unwrap_or_default());
        all
    }
}

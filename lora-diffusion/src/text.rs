//! From prompts to what the UNet is conditioned on: one text encoder, or SDXL's two.

use lora_torch::{Projection, Projections};
use tch::{Device, Kind, Tensor};

use crate::{
    Result,
    clip::Clip,
    tokenizer::{LENGTH, Tokenizer},
};

/// What the UNet is told of a batch of prompts.
#[derive(Debug)]
pub struct Conditioning {
    /// `[b, 77, d]`.
    pub context: Tensor,
    /// SDXL's pooled embedding, `[b, 1280]`.
    pub pooled: Option<Tensor>,
}

impl Conditioning {
    /// The same shapes, all zeros: SDXL's missing negative prompt.
    pub fn zeros(&self) -> Result<Self> {
        let pooled = self.pooled.as_ref().map(Tensor::f_zeros_like).transpose()?;
        Ok(Self { context: self.context.f_zeros_like()?, pooled })
    }
}

/// A tokenizer and the encoder that reads its ids.
#[derive(Debug)]
pub struct TextPart {
    /// From a prompt to ids.
    pub tokenizer: Tokenizer,
    /// From ids to features.
    pub encoder: Clip,
}

/// The text side of a base.
#[derive(Debug)]
pub struct Text {
    /// One part, or SDXL's two.
    pub parts: Vec<TextPart>,
    /// How many of the encoder's last layers are left out; 1 is the "clip skip 2" of kohya and A1111. SDXL leaves out
    /// one more by itself.
    pub clip_skip: usize,
    /// Whether contexts are taken before the last layer and joined, with a pooled embedding besides.
    pub sdxl: bool,
}

impl Text {
    /// The ids of prompts for each part, `[b, 77]` each, on the host.
    pub fn ids<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Vec<Tensor>> {
        let of_part = |part: &TextPart| {
            let ids: Vec<i64> = prompts.iter().flat_map(|prompt| part.tokenizer.ids(prompt.as_ref())).collect();
            Ok(Tensor::f_from_slice(&ids)?.f_view([prompts.len() as i64, LENGTH as i64])?)
        };
        self.parts.iter().map(of_part).collect()
    }

    /// What the UNet is conditioned on, from the ids of each part, `[b, 77]`, on the encoders' device.
    ///
    /// Nothing waits for the device, so that text encoders can be trained with it.
    pub fn encode_ids(&self, ids: &[Tensor]) -> Result<Conditioning> {
        if !self.sdxl {
            let [part, ..] = &self.parts[..] else { return self.empty() };
            let [ids, ..] = ids else { return self.empty() };
            return Ok(Conditioning { context: part.encoder.context(ids, self.clip_skip)?, pooled: None });
        }
        let mut contexts = Vec::new();
        let mut pooled = None;
        for (part, ids) in self.parts.iter().zip(ids) {
            let output = part.encoder.forward(ids)?;
            contexts.push(match self.clip_skip {
                0 => output.penultimate,
                skip => part.encoder.hidden(ids, skip + 1)?,
            });
            pooled = output.projected.or(pooled);
        }
        Ok(Conditioning { context: Tensor::f_cat(&contexts, -1)?, pooled })
    }

    /// What the UNet is conditioned on, for prompts.
    pub fn encode<S: AsRef<str>>(&self, prompts: &[S], device: Device) -> Result<Conditioning> {
        let ids = self.ids(prompts)?;
        let ids: Vec<Tensor> = ids.iter().map(|ids| ids.f_to_device(device)).collect::<Result<_, _>>()?;
        self.encode_ids(&ids)
    }

    fn empty(&self) -> Result<Conditioning> {
        Ok(Conditioning { context: Tensor::f_zeros([0, 0, 0], (Kind::Float, Device::Cpu))?, pooled: None })
    }
}

impl Projections for Text {
    fn projections(&mut self) -> Vec<&mut Projection> {
        self.parts.iter_mut().flat_map(|part| part.encoder.projections()).collect()
    }
}

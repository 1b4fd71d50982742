//! The timestep, and SDXL's pooled text and sizes, as one vector (Vaswani et al. 2017, §3.5; Podell et al. 2023, §2.2).

use lora_torch::{Projection, Scope};
use tch::{Device, Kind, Tensor};

use super::config::{Addition, UnetConfig};
use crate::{Error, Result, layers::silu};

/// Numbers as cosines and sines of falling frequencies.
///
/// The products are formed in f64: an f32 sine of an argument near 1000 is off by up to 6e-5.
#[derive(Debug)]
pub struct Sinusoid {
    /// `[width/2]`, f64.
    frequencies: Tensor,
    cosine_first: bool,
}

impl Sinusoid {
    /// `width` numbers for each number; frequencies fall from 1 to nearly 1/10000.
    ///
    /// # Errors
    /// If the device has no room for the table.
    pub fn new(width: usize, cosine_first: bool, shift: f64, device: Device) -> Result<Self> {
        let half = width / 2;
        let frequencies: Vec<f64> =
            (0..half).map(|i| (-(10_000_f64.ln()) * i as f64 / (half as f64 - shift)).exp()).collect();
        Ok(Self { frequencies: Tensor::f_from_slice(&frequencies)?.f_to_device(device)?, cosine_first })
    }

    /// `[n]` numbers of any kind → `[n, width]` of `kind`.
    pub fn forward(&self, numbers: &Tensor, kind: Kind) -> Result<Tensor> {
        let angles = numbers.f_to_kind(Kind::Double)?.f_unsqueeze(-1)?.f_mul(&self.frequencies)?; // [n, width/2]
        let (cosines, sines) = (angles.f_cos()?, angles.f_sin()?);
        let parts = if self.cosine_first { [cosines, sines] } else { [sines, cosines] };
        Ok(Tensor::f_cat(&parts, -1)?.f_to_kind(kind)?)
    }

    /// SDXL's size conditioning: `[b, 6]` sizes → `[b, 6·width]`.
    pub fn forward_sizes(&self, sizes: &Tensor, kind: Kind) -> Result<Tensor> {
        let &[b, n] = sizes.size().as_slice() else {
            return Err(Error::Shape { what: "time ids", actual: sizes.size(), expected: "[batch, 6]" });
        };
        Ok(self.forward(&sizes.f_reshape([b * n])?, kind)?.f_view([b, -1])?)
    }
}

/// What SDXL is told besides the prompt.
#[derive(Debug)]
pub struct Added {
    /// The pooled embedding of the second text encoder, `[b, 1280]`.
    pub pooled: Tensor,
    /// Original height and width, crop top and left, target height and width, in pixels; `[b, 6]`.
    pub time_ids: Tensor,
}

/// The vector that every residual block gets.
#[derive(Debug)]
pub(super) struct TimeEmbedding {
    sinusoid: Sinusoid,
    time: Mlp,
    added: Option<(Sinusoid, Mlp)>,
    kind: Kind,
}

impl TimeEmbedding {
    pub(super) fn new(scope: &Scope<'_>, config: &UnetConfig) -> Result<Self> {
        let first = config.block_out_channels[0];
        let device = scope.backend().device;
        let sinusoid = |width| Sinusoid::new(width, config.flip_sin_to_cos, config.freq_shift, device);
        let added = match config.addition_embed_type {
            Some(Addition::TextTime) => {
                let width = config.addition_time_embed_dim.unwrap_or(0);
                let input = config.projection_class_embeddings_input_dim.unwrap_or(0);
                Some((sinusoid(width)?, Mlp::new(&(scope / "add_embedding"), input, 4 * first)?))
            }
            None => None,
        };
        Ok(Self {
            sinusoid: sinusoid(first)?,
            time: Mlp::new(&(scope / "time_embedding"), first, 4 * first)?,
            added,
            kind: scope.backend().kind,
        })
    }

    /// `timesteps` `[b]` → `[b, width]`, with the activation that every residual block would begin with.
    pub(super) fn forward(&self, timesteps: &Tensor, added: Option<&Added>) -> Result<Tensor> {
        let time = self.time.forward(&self.sinusoid.forward(timesteps, self.kind)?)?; // [b, width]
        let sum = match (&self.added, added) {
            (None, _) => time,
            (Some((sinusoid, mlp)), Some(Added { pooled, time_ids })) => {
                let sizes = sinusoid.forward_sizes(time_ids, self.kind)?;
                time.f_add(&mlp.forward(&Tensor::f_cat(&[pooled.f_to_kind(self.kind)?, sizes], -1)?)?)?
            }
            (Some(_), None) => {
                return Err(Error::Request {
                    option: "conditioning",
                    reason: "this base needs a pooled text embedding and sizes".into(),
                });
            }
        };
        silu(sum)
    }

    pub(super) fn projections(&mut self) -> impl Iterator<Item = &mut Projection> {
        let added = self.added.iter_mut().flat_map(|(_, mlp)| mlp.projections());
        self.time.projections().into_iter().chain(added)
    }
}

/// Two linear layers with an activation between them.
#[derive(Debug)]
struct Mlp {
    first: Projection,
    second: Projection,
}

impl Mlp {
    fn new(scope: &Scope<'_>, input: usize, width: usize) -> Result<Self> {
        Ok(Self {
            first: Projection::linear(&(scope / "linear_1"), [width, input], true)?,
            second: Projection::linear(&(scope / "linear_2"), [width, width], true)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.second.forward(&silu(self.first.forward(x)?)?)?)
    }

    fn projections(&mut self) -> [&mut Projection; 2] {
        [&mut self.first, &mut self.second]
    }
}

//! LoRA, LoCon and their Tucker form: `ΔW = scale · B·A` (Hu et al. 2021, arXiv 2106.09685, eq. 3 and §4.1).
//!
//! rsLoRA is the same update under another scale rule ([`AdapterConfig::scale`]). Starts that take their factors out of
//! the base weight (PiSSA, OLoRA) keep the base as it is and subtract the frozen starting product instead, so that ΔW is
//! zero at first and the result is a plain LoRA of twice the rank ([`Lora::widened`]).

use super::{Adapter, Geometry, Layer, Part, shape};
use crate::{AdapterConfig, Backend, ConvGeometry, Draw, Init, Result};

/// Two factors whose product is the update.
#[derive(Debug, Clone)]
pub struct Lora<T> {
    /// `A`, `[rank, in]` or `[rank, in, kh, kw]` (`[rank, in, 1, 1]` with a core).
    pub down: T,
    /// `B`, `[out, rank]`, trailing axes of length 1 allowed.
    pub up: T,
    /// The Tucker core between them, `[rank, rank, kh, kw]`, from `down`'s channels to `up`'s.
    pub mid: Option<T>,
    /// Difference of the bias before the scale (`lora_B.bias` of peft), `[out]`.
    pub up_bias: Option<T>,
    /// The frozen product that [`Init::Pissa`](crate::Init::Pissa) and [`Init::Olora`](crate::Init::Olora) started from.
    pub start: Option<Start<T>>,
    /// What multiplies the product.
    pub scale: f64,
}

/// What the factors were at first; its product is subtracted.
#[derive(Debug, Clone)]
pub struct Start<T> {
    /// `A` at the start, shaped as `A`.
    pub down: T,
    /// `B` at the start, shaped as `B`.
    pub up: T,
}

impl<T> Lora<T> {
    /// A plain update of two factors.
    pub fn new(down: T, up: T, scale: f64) -> Self {
        Self { down, up, mid: None, up_bias: None, start: None, scale }
    }

    /// What a start takes out of the base weight `base` for factors of a rank and scale; `None` for the starts that draw
    /// at random. Files of peft that were saved unconverted need it: they hold `A` and `B`, and mean `B·A − B₀·A₀`.
    ///
    /// # Errors
    /// If the base weight has no such rank, or its decomposition fails.
    pub fn start_of<B: Backend<Tensor = T>>(
        on: &B,
        base: &T,
        init: Init,
        rank: usize,
        scale: f64,
    ) -> Result<Option<Start<T>>> {
        super::init::start(on, base, init, rank, scale, None)
    }

    pub(super) fn map<U>(&self, change: &mut dyn FnMut(Part, &T) -> Result<U>) -> Result<Lora<U>> {
        Ok(Lora {
            down: change(Part::Down, &self.down)?,
            up: change(Part::Up, &self.up)?,
            mid: self.mid.as_ref().map(|mid| change(Part::Mid, mid)).transpose()?,
            up_bias: self.up_bias.as_ref().map(|bias| change(Part::UpBias, bias)).transpose()?,
            start: match &self.start {
                Some(start) => {
                    Some(Start { down: change(Part::StartDown, &start.down)?, up: change(Part::StartUp, &start.up)? })
                }
                None => None,
            },
            scale: self.scale,
        })
    }

    /// The same update as two factors alone: with a [`start`](Self::start), of twice the rank and under the same scale.
    ///
    /// `scale·(B·A − B₀·A₀) = scale·[B, −B₀]·[A; A₀]`, what peft writes when it converts PiSSA and OLoRA.
    pub fn widened<B: Backend<Tensor = T>>(&self, on: &B) -> Result<Self> {
        let share = |tensor: &Option<T>| tensor.as_ref().map(|tensor| on.share(tensor)).transpose();
        let (down, up) = match &self.start {
            None => (on.share(&self.down)?, on.share(&self.up)?),
            Some(start) => (
                on.concat(&[on.share(&self.down)?, on.share(&start.down)?], 0)?,
                on.concat(&[on.share(&self.up)?, on.scale(&start.up, -1.0)?], 1)?,
            ),
        };
        Ok(Self { down, up, mid: share(&self.mid)?, up_bias: share(&self.up_bias)?, start: None, scale: self.scale })
    }
}

impl<B: Backend> Adapter<B> for Lora<B::Tensor> {
    fn init(on: &B, base: &B::Tensor, config: &AdapterConfig, draw: &mut Draw) -> Result<Self> {
        super::init::lora(on, base, config, draw)
    }

    fn scale(&self) -> f64 {
        self.scale
    }

    fn delta(&self, on: &B, base: &B::Tensor) -> Result<B::Tensor> {
        self.change(on, base, 1.0)
    }

    /// Scale and strength go into `B`, the smallest tensor that they can go into.
    fn change(&self, on: &B, base: &B::Tensor, strength: f64) -> Result<B::Tensor> {
        let product = |down: &B::Tensor, up: &B::Tensor, factor: f64| {
            let (down, up) = (shape::flat(on, down)?, on.scale(&shape::flat(on, up)?, factor)?);
            match &self.mid {
                None => on.matmul(&up, &down),
                Some(mid) => shape::tucker(on, mid, &on.transpose(&up)?, &down),
            }
        };
        let factor = strength * self.scale;
        let mut change = product(&self.down, &self.up, factor)?; // [out, in·kh·kw]
        if let Some(start) = &self.start {
            change = on.sub(&change, &product(&start.down, &start.up, factor)?)?;
        }
        shape::laid_as(on, change, base)
    }

    /// Two plain factors go onto the weight in one operation, without a change of its size in between. With a start, the
    /// change is formed: it is exactly zero at first, which two additions would round away.
    fn merge(&self, on: &B, base: &B::Tensor, strength: f64) -> Result<B::Tensor> {
        if strength == 0.0 {
            return on.share(base);
        }
        if self.mid.is_some() || self.start.is_some() {
            return on.add(base, &self.change(on, base, strength)?);
        }
        let (down, up) = (shape::flat(on, &self.down)?, shape::flat(on, &self.up)?);
        let merged = on.linear_onto(&shape::flat(on, base)?, &up, &on.transpose(&down)?, strength * self.scale)?;
        shape::laid_as(on, merged, base)
    }

    fn bias_change(&self, on: &B, _bias: Option<&B::Tensor>, strength: f64) -> Result<Option<B::Tensor>> {
        self.up_bias.as_ref().map(|bias| on.scale(bias, strength * self.scale)).transpose()
    }

    fn forward(
        &self,
        on: &B,
        layer: &Layer<'_, B::Tensor>,
        x: &B::Tensor,
        y: &B::Tensor,
        strength: f64,
    ) -> Result<B::Tensor> {
        if strength == 0.0 {
            return on.share(y);
        }
        let output = self.products_onto(on, layer, x, y, strength)?;
        match self.bias_change(on, layer.bias, strength)? {
            Some(change) => on.add(&output, &shape::over_activations(on, &change, layer.geometry)?),
            None => Ok(output),
        }
    }

    fn factors(&self) -> Vec<(Part, &B::Tensor)> {
        let mut factors = vec![(Part::Down, &self.down), (Part::Up, &self.up)];
        factors.extend(self.mid.iter().map(|mid| (Part::Mid, mid)));
        factors.extend(self.up_bias.iter().map(|bias| (Part::UpBias, bias)));
        if let Some(start) = &self.start {
            factors.extend([(Part::StartDown, &start.down), (Part::StartUp, &start.up)]);
        }
        factors
    }
}

impl<T> Lora<T> {
    /// `y + strength · ΔW·x` without the bias.
    pub(super) fn products_onto<B: Backend<Tensor = T>>(
        &self,
        on: &B,
        layer: &Layer<'_, T>,
        x: &T,
        y: &T,
        strength: f64,
    ) -> Result<T> {
        let factor = strength * self.scale;
        let output = self.product_onto(on, layer, [&self.down, &self.up], x, y, factor)?;
        match &self.start {
            Some(start) => self.product_onto(on, layer, [&start.down, &start.up], x, &output, -factor),
            None => Ok(output),
        }
    }

    /// `magnitude / ‖W + strength · ΔW‖` of every row, `[out]`; only for updates without a core.
    pub(super) fn row_factors<B: Backend<Tensor = T>>(
        &self,
        on: &B,
        magnitude: &T,
        base: &T,
        strength: f64,
    ) -> Result<T> {
        let whole = self.widened(on)?;
        let (up, down) = (shape::flat(on, &whole.up)?, shape::flat(on, &whole.down)?);
        on.row_factors(magnitude, &shape::flat(on, base)?, [&up, &down], strength * self.scale)
    }

    /// `y + factor · B·(A·x)`: two narrow layers, ΔW is never formed.
    fn product_onto<B: Backend<Tensor = T>>(
        &self,
        on: &B,
        layer: &Layer<'_, T>,
        [down, up]: [&T; 2],
        x: &T,
        y: &T,
        factor: f64,
    ) -> Result<T> {
        match layer.geometry {
            Geometry::Linear => {
                let mut narrow = on.linear(x, &shape::flat(on, down)?)?; // [.., rank]
                if let Some(mid) = &self.mid {
                    narrow = on.linear(&narrow, &shape::flat(on, mid)?)?;
                }
                on.linear_onto(y, &narrow, &shape::flat(on, up)?, factor)
            }
            Geometry::Conv(geometry) => {
                let point = ConvGeometry::POINTWISE;
                let down = shape::as_kernel(on, down, layer.weight)?;
                let narrow = match &self.mid {
                    None => on.conv2d(x, &down, geometry)?, // [b, rank, h', w']
                    Some(mid) => on.conv2d(&on.conv2d(x, &down, point)?, mid, geometry)?,
                };
                let up = shape::as_point(on, up)?;
                on.add(y, &on.scale(&on.conv2d(&narrow, &up, point)?, factor)?)
            }
        }
    }
}

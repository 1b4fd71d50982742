//! LoRA, LoCon and their Tucker form: `ΔW = scale · B·A` (Hu et al. 2021, arXiv 2106.09685, eq. 3 and §4.1).
//!
//! rsLoRA is the same update under another scale rule ([`AdapterConfig::scale`]). Starts that take their factors out of
//! the base weight (PiSSA, OLoRA) keep the base as it is and subtract the frozen starting product instead, so that ΔW is
//! zero at first and the result is a plain LoRA of twice the rank ([`Lora::widened`]).

use super::{Adapter, Geometry, Layer, Part, shape};
use crate::{AdapterConfig, Backend, ConvGeometry, Draw, Result};

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
        let product = |down: &B::Tensor, up: &B::Tensor| match &self.mid {
            None => on.matmul(&shape::flat(on, up)?, &shape::flat(on, down)?),
            Some(mid) => shape::tucker(on, mid, &on.transpose(&shape::flat(on, up)?)?, &shape::flat(on, down)?),
        };
        let mut delta = product(&self.down, &self.up)?;
        if let Some(start) = &self.start {
            delta = on.sub(&delta, &product(&start.down, &start.up)?)?;
        }
        on.reshape(&on.scale(&delta, self.scale)?, &on.shape(base))
    }

    fn merge_bias(
        &self,
        on: &B,
        base: Option<&B::Tensor>,
        _weight: &B::Tensor,
        strength: f64,
    ) -> Result<Option<B::Tensor>> {
        match &self.up_bias {
            Some(bias) if strength != 0.0 => {
                let change = on.scale(bias, strength * self.scale)?;
                Ok(Some(base.map_or_else(|| on.share(&change), |base| on.add(base, &change))?))
            }
            _ => base.map(|base| on.share(base)).transpose(),
        }
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
        let factor = strength * self.scale;
        let mut output = self.product_onto(on, layer, [&self.down, &self.up], x, y, factor)?;
        if let Some(start) = &self.start {
            output = self.product_onto(on, layer, [&start.down, &start.up], x, &output, -factor)?;
        }
        match &self.up_bias {
            Some(bias) => on.add(&output, &shape::over_channels(on, &on.scale(bias, factor)?, layer.geometry)?),
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

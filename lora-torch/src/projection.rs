//! One frozen linear layer or convolution with room for adapters: the only place where models and adapters meet.
//!
//! Every model is built of these, so that an adapter can sit in any of its layers. The base weight never changes and
//! never takes part in gradients; adapters add to the output (Hu et al. 2021, arXiv 2106.09685, eq. 3).

use lora_core::{Adapter, AnyAdapter, ConvGeometry, Geometry, Layer, format::Component};
use tch::Tensor;

use crate::{
    Result, Scope, Torch,
    backend::{convolve, rows},
};

/// A frozen layer and the adapters on it.
#[derive(Debug)]
pub struct Projection {
    path: String,
    component: Option<Component>,
    on: Torch,
    weight: Tensor,
    bias: Option<Tensor>,
    geometry: Geometry,
    attached: Vec<Attached>,
    trained: Option<AnyAdapter<Tensor>>,
}

/// An adapter that was loaded, and how strongly it acts.
#[derive(Debug)]
struct Attached {
    adapter: AnyAdapter<Tensor>,
    strength: f64,
}

/// A model whose layers can carry adapters.
pub trait Projections {
    /// Every projection, in the order of the checkpoint's modules.
    fn projections(&mut self) -> Vec<&mut Projection>;
}

impl Projection {
    /// A linear layer from `scope`'s tensors `weight` `[out, in]` and, if it has one, `bias` `[out]`.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn linear(scope: &Scope<'_>, [out, inner]: [usize; 2], bias: bool) -> Result<Self> {
        Self::read(scope, &[out, inner], bias, Geometry::Linear)
    }

    /// A convolution from `scope`'s tensors `weight` `[out, in, kh, kw]` and, if it has one, `bias` `[out]`.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn conv2d(scope: &Scope<'_>, shape: [usize; 4], geometry: ConvGeometry, bias: bool) -> Result<Self> {
        Self::read(scope, &shape, bias, Geometry::Conv(geometry))
    }

    fn read(scope: &Scope<'_>, shape: &[usize], bias: bool, geometry: Geometry) -> Result<Self> {
        Ok(Self {
            path: scope.path().to_owned(),
            component: scope.component(),
            on: scope.backend(),
            weight: scope.tensor("weight", shape)?,
            bias: if bias { Some(scope.tensor("bias", &shape[..1])?) } else { None },
            geometry,
            attached: Vec::new(),
            trained: None,
        })
    }

    /// The adapted output: linear `[.., in] → [.., out]`, conv `[b, in, h, w] → [b, out, h', w']`.
    ///
    /// # Errors
    /// If the shapes do not fit, or memory runs out.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let adapters =
            self.attached.iter().map(|a| (&a.adapter, a.strength)).chain(self.trained.iter().map(|a| (a, 1.0)));
        match self.geometry {
            Geometry::Linear => {
                let input = rows(x)?; // [rows, in]: a fresh matrix can take the adapters' products in place
                let mut y = input.f_linear(&self.weight, self.bias.as_ref())?;
                for (adapter, strength) in adapters {
                    y = self.adapt_rows(adapter, strength, &input, y)?;
                }
                let mut shape = x.size();
                if shape.len() == 2 {
                    return Ok(y);
                }
                if let (Some(width), [_, out]) = (shape.last_mut(), y.size().as_slice()) {
                    *width = *out;
                }
                Ok(y.f_view(shape.as_slice())?)
            }
            Geometry::Conv(geometry) => {
                let mut y = convolve(x, &self.weight, self.bias.as_ref(), geometry)?;
                for (adapter, strength) in adapters {
                    y = adapter.forward(&self.on, &self.layer(), x, &y, strength)?;
                }
                Ok(y)
            }
        }
    }

    /// The checkpoint's name of this module, for example `mid_block.attentions.0.proj_in`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The component that this module belongs to, if its weights say so.
    pub fn component(&self) -> Option<Component> {
        self.component
    }

    /// The base weight, `[out, in]` or `[out, in, kh, kw]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The base bias, `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// How the weight is applied.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Device and kind of the base weight.
    pub fn backend(&self) -> Torch {
        self.on
    }

    /// Whether it is a convolution whose window covers more than one position.
    pub fn is_conv_with_kernel(&self) -> bool {
        self.weight.size().get(2..).is_some_and(|window| window.iter().any(|length| *length > 1))
    }

    /// Adds a loaded adapter; several add up, in the order in which they came.
    pub fn attach(&mut self, adapter: AnyAdapter<Tensor>, strength: f64) {
        self.attached.push(Attached { adapter, strength });
    }

    /// Takes all loaded adapters off; the one in training stays.
    pub fn detach_all(&mut self) {
        self.attached.clear();
    }

    /// Puts the adapter in training on, or takes it off; its tensors may be views that are new in each step.
    pub fn set_trained(&mut self, adapter: Option<AnyAdapter<Tensor>>) {
        self.trained = adapter;
    }

    fn layer(&self) -> Layer<'_, Tensor> {
        Layer { weight: &self.weight, bias: self.bias.as_ref(), geometry: self.geometry }
    }

    /// Adds an adapter to `y` `[rows, out]`, the layer's own output for `x` `[rows, in]`.
    ///
    /// Plain LoRA goes into `y` in place, one narrow and one wide product and no pass of its own over `y`. Nobody else
    /// holds `y`, and the backward pass of a linear layer does not need it.
    fn adapt_rows(&self, adapter: &AnyAdapter<Tensor>, strength: f64, x: &Tensor, mut y: Tensor) -> Result<Tensor> {
        let AnyAdapter::Lora(lora) = adapter else {
            return Ok(adapter.forward(&self.on, &self.layer(), x, &y, strength)?);
        };
        if strength == 0.0 || lora.mid.is_some() || lora.start.is_some() || lora.up_bias.is_some() {
            return Ok(lora.forward(&self.on, &self.layer(), x, &y, strength)?);
        }
        let narrow = x.f_linear(&lora.down, None::<&Tensor>)?; // [rows, rank]
        let factor = lora.scale * strength;
        let narrow = if factor == 1.0 { narrow } else { narrow.f_mul_scalar(factor)? };
        Ok(y.f_addmm_(&narrow, &lora.up.f_transpose(0, 1)?)?)
    }
}

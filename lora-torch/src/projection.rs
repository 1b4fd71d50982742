//! One frozen linear layer or convolution with room for adapters: the only place where models and adapters meet.
//!
//! Every model is built of these, so that an adapter can sit in any of its layers. The base weight never changes and
//! never takes part in gradients; adapters add to the output (Hu et al. 2021, arXiv 2106.09685, eq. 3).

use lora_core::{Adapter, AnyAdapter, ConvGeometry, Geometry, Layer, adapter::Lora, format::Component};
use tch::{Device, Kind, Tensor};

use crate::{
    BaseWeight, Error, Result, Scope, Torch,
    backend::{convolve, rows},
};

/// A frozen layer and the adapters on it.
#[derive(Debug)]
pub struct Projection {
    path: String,
    component: Option<Component>,
    on: Torch,
    weight: BaseWeight,
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
    /// The file that it came from, by the number that [`attach`](crate::attach()) gave it.
    file: Option<usize>,
}

/// A model whose layers can carry adapters.
pub trait Projections {
    /// Every projection, in the order of the checkpoint's modules.
    fn projections(&mut self) -> Vec<&mut Projection>;
}

impl Projection {
    /// A linear layer from `scope`'s tensors `weight` `[out, in]` and, if it has one, `bias` `[out]`.
    ///
    /// The weight is in 4 bits where [`Scope::weight`] says so.
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

    /// A layer of tensors that are there already; device and kind are the weight's.
    ///
    /// # Errors
    /// If the weight is neither a matrix nor, for a convolution, a kernel.
    pub fn new(path: impl Into<String>, weight: Tensor, bias: Option<Tensor>, geometry: Geometry) -> Result<Self> {
        let (path, axes) = (path.into(), weight.dim());
        let expected = if geometry == Geometry::Linear { 2 } else { 4 };
        if axes != expected {
            let reason = format!("`{path}` has a weight of {axes} axes, expected {expected}");
            return Err(Error::Config { option: "targets", reason });
        }
        let on = Torch { device: weight.device(), kind: weight.f_kind()? };
        let weight = BaseWeight::Full(weight);
        Ok(Self { path, component: None, on, weight, bias, geometry, attached: Vec::new(), trained: None })
    }

    /// A layer at `scope` over a weight `[out, in]` that was read already: a head that is another module's table, or a table
    /// of rows that ids are [looked up](Self::lookup) in.
    pub fn over(scope: &Scope<'_>, weight: BaseWeight) -> Self {
        Self {
            path: scope.path().to_owned(),
            component: scope.component(),
            on: scope.backend(),
            weight,
            bias: None,
            geometry: Geometry::Linear,
            attached: Vec::new(),
            trained: None,
        }
    }

    fn read(scope: &Scope<'_>, shape: &[usize], bias: bool, geometry: Geometry) -> Result<Self> {
        Ok(Self {
            path: scope.path().to_owned(),
            component: scope.component(),
            on: scope.backend(),
            weight: scope.weight(shape)?,
            bias: if bias { Some(scope.tensor("bias", &shape[..1])?) } else { None },
            geometry,
            attached: Vec::new(),
            trained: None,
        })
    }

    /// The adapted output: linear `[.., in] → [.., out]`, conv `[b, in, h, w] → [b, out, h', w']`.
    ///
    /// A 1×1 convolution also takes rows, one a position, `[rows, in] → [rows, out]`: the same numbers by a matrix product,
    /// without the layouts that convolutions are computed in.
    ///
    /// # Errors
    /// If the shapes do not fit, or memory runs out.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self.geometry {
            Geometry::Linear => {
                let input = rows(x)?; // [rows, in]: a fresh matrix can take the adapters' products in place
                let y = self.weight.linear(&input, self.bias.as_ref())?;
                let y = self.adapt(&input, y, Self::adapt_rows)?;
                let mut shape = x.size();
                if shape.len() == 2 {
                    return Ok(y);
                }
                if let (Some(width), [_, out]) = (shape.last_mut(), y.size().as_slice()) {
                    *width = *out;
                }
                Ok(y.f_view(shape.as_slice())?)
            }
            Geometry::Conv(_) if x.dim() == 2 && !self.is_conv_with_kernel() => {
                let y = x.f_linear(&without_window(&self.weight()?)?, self.bias.as_ref())?;
                self.adapt(x, y, Self::adapt_rows)
            }
            Geometry::Conv(geometry) => {
                let y = convolve(x, &self.weight()?, self.bias.as_ref(), geometry)?;
                self.adapt(x, y, |layer, adapter, strength, x, y| layer.adapt_whole(adapter, strength, x, &y))
            }
        }
    }

    /// The rows of a table at `ids`, with what all adapters add to them: `[..] → [.., width]`.
    ///
    /// An adapter of a table is that of a layer with this weight: `up` `[words, rank]` has a row for each id. (peft keeps
    /// both factors turned over, and calls this one `lora_embedding_A`.)
    ///
    /// # Errors
    /// If an id has no row, or memory runs out.
    pub fn lookup(&self, ids: &Tensor) -> Result<Tensor> {
        let rows_of = |table: &Tensor| Tensor::f_embedding(table, ids, -1, false, false);
        let plain = |adapter: &AnyAdapter<Tensor>| matches!(adapter, AnyAdapter::Lora(lora) if is_plain(lora));
        if !self.adapters().all(|(adapter, _)| plain(adapter)) {
            return Ok(rows_of(&self.merged()?.0)?);
        }
        let mut rows = self.weight.rows(ids, self.on.kind)?;
        for (adapter, strength) in self.adapters() {
            let AnyAdapter::Lora(lora) = adapter else { continue };
            let change = rows_of(&lora.up)?.f_matmul(&lora.down)?; // [.., width]
            rows = rows.f_add(&change.f_mul_scalar(lora.scale * strength)?)?;
        }
        Ok(rows)
    }

    /// `y`, the frozen layer's output for `x`, with what all adapters add.
    ///
    /// Low-rank products may follow one another. DoRA, (IA)³ and OFT read the frozen output, so where one of them shares
    /// the layer with another adapter, each change is measured from that output, as in [`merged`](Self::merged).
    fn adapt(
        &self,
        x: &Tensor,
        y: Tensor,
        one: impl Fn(&Self, &AnyAdapter<Tensor>, f64, &Tensor, Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let adds = |adapter: &AnyAdapter<Tensor>| {
            matches!(adapter, AnyAdapter::Lora(_) | AnyAdapter::Loha(_) | AnyAdapter::Lokr(_) | AnyAdapter::Full(_))
        };
        if self.adapters().count() < 2 || self.adapters().all(|(adapter, _)| adds(adapter)) {
            return self.adapters().try_fold(y, |y, (adapter, strength)| one(self, adapter, strength, x, y));
        }
        let mut sum = y.shallow_clone();
        for (adapter, strength) in self.adapters() {
            let change = self.adapt_whole(adapter, strength, x, &y)?.f_sub(&y)?;
            sum = sum.f_add(&change)?;
        }
        Ok(sum)
    }

    /// Weight and bias with all adapters in them, differentiable in the adapters; the base stays as it is.
    ///
    /// # Errors
    /// If an adapter does not fit, or memory runs out.
    pub fn merged(&self) -> Result<(Tensor, Option<Tensor>)> {
        let base = self.weight()?;
        let (mut weight, mut bias) = (base.shallow_clone(), self.bias.as_ref().map(Tensor::shallow_clone));
        // Each change is measured from the base, as in the forward pass, so that the order of adapters does not count.
        for (adapter, strength) in self.adapters() {
            weight = weight.f_add(&adapter.change(&self.on, &base, strength)?)?;
            if let Some(change) = adapter.bias_change(&self.on, self.bias.as_ref(), strength)? {
                bias = Some(match bias {
                    Some(bias) => bias.f_add(&change)?,
                    None => change,
                });
            }
        }
        Ok((weight, bias))
    }

    /// The checkpoint's name of this module, for example `mid_block.attentions.0.proj_in`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The component that this module belongs to, if its weights say so.
    pub fn component(&self) -> Option<Component> {
        self.component
    }

    /// The base weight in full, `[out, in]` or `[out, in, kh, kw]`, in the kind that the layer computes in.
    ///
    /// One that is in 4 bits is made for this call: whoever wants its [shape](Self::shape) alone asks for that.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn weight(&self) -> Result<Tensor> {
        self.weight_in(self.on.kind)
    }

    /// The base weight in full in another kind.
    ///
    /// # Errors
    /// As [`weight`](Self::weight).
    pub fn weight_in(&self, kind: Kind) -> Result<Tensor> {
        self.weight.full(kind)
    }

    /// The base weight as it is stored; `None` if it is in 4 bits.
    pub fn stored(&self) -> Option<&Tensor> {
        self.weight.stored()
    }

    /// The shape of the base weight, `[out, in]` or `[out, in, kh, kw]`.
    pub fn shape(&self) -> Vec<i64> {
        self.weight.shape()
    }

    /// Whether the base weight is kept in fewer bits than it computes with.
    pub fn is_quantised(&self) -> bool {
        self.weight.is_quantised()
    }

    /// The base bias, `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// How the weight is applied.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Where the layer computes, and in which kind.
    pub fn backend(&self) -> Torch {
        self.on
    }

    /// Whether it is a convolution whose window covers more than one position.
    pub fn is_conv_with_kernel(&self) -> bool {
        self.shape().get(2..).is_some_and(|window| window.iter().any(|length| *length > 1))
    }

    /// Whether no adapter acts on it, so that its weight and bias are all there is to it.
    pub fn is_bare(&self) -> bool {
        self.adapters().next().is_none()
    }

    /// The factors `down` and `up` of each adapter, with what their product is multiplied by; `None` if one of them is more
    /// than that.
    pub fn low_rank(&self) -> Option<Vec<(&Tensor, &Tensor, f64)>> {
        let factors = self.adapters().map(|(adapter, strength)| match adapter {
            AnyAdapter::Lora(lora) if is_plain(lora) => Some((&lora.down, &lora.up, lora.scale * strength)),
            _ => None,
        });
        factors.collect()
    }

    /// Adds a loaded adapter; several add up, in the order in which they came.
    pub fn attach(&mut self, adapter: AnyAdapter<Tensor>, strength: f64) {
        self.attached.push(Attached { adapter, strength, file: None });
    }

    /// Adds an adapter of a numbered file, whose strength can be [set](Self::set_strength) later.
    pub(crate) fn attach_from(&mut self, file: usize, adapter: AnyAdapter<Tensor>, strength: f64) {
        self.attached.push(Attached { adapter, strength, file: Some(file) });
    }

    /// Sets how strongly the adapters of a numbered file act; at 0 it is as if they were not there.
    pub(crate) fn set_strength(&mut self, file: usize, strength: f64) {
        for attached in self.attached.iter_mut().filter(|attached| attached.file == Some(file)) {
            attached.strength = strength;
        }
    }

    /// A number above those of all files whose adapters are on it.
    pub(crate) fn next_file(&self) -> usize {
        self.attached.iter().filter_map(|attached| attached.file).max().map_or(0, |last| last + 1)
    }

    /// Takes all loaded adapters off; the one in training stays.
    pub fn detach_all(&mut self) {
        self.attached.clear();
    }

    /// Puts the adapter in training on, or takes it off; its tensors may be views that are new in each step.
    pub fn set_trained(&mut self, adapter: Option<AnyAdapter<Tensor>>) {
        self.trained = adapter;
    }

    /// The tensors of the adapter in training that gradients are asked for.
    ///
    /// # Errors
    /// If the adapter does not hold together.
    pub fn leaves(&self) -> Result<Vec<Tensor>> {
        let mut leaves = Vec::new();
        if let Some(adapter) = &self.trained {
            adapter.map(&mut |_, tensor| {
                if tensor.requires_grad() {
                    leaves.push(tensor.shallow_clone());
                }
                Ok(())
            })?;
        }
        Ok(leaves)
    }

    /// Every adapter that acts, with its strength, the one in training last.
    fn adapters(&self) -> impl Iterator<Item = (&AnyAdapter<Tensor>, f64)> {
        let attached = self.attached.iter().map(|attached| (&attached.adapter, attached.strength));
        let attached = attached.filter(|(_, strength)| *strength != 0.0);
        attached.chain(self.trained.iter().map(|adapter| (adapter, 1.0)))
    }

    /// Adds an adapter to `y` `[rows, out]`, the layer's own output for `x` `[rows, in]`.
    ///
    /// Plain LoRA goes into `y` in place, one narrow and one wide product and no pass of its own over `y`. Nobody else
    /// holds `y`, and the backward pass of a linear layer does not need it.
    fn adapt_rows(&self, adapter: &AnyAdapter<Tensor>, strength: f64, x: &Tensor, mut y: Tensor) -> Result<Tensor> {
        let AnyAdapter::Lora(lora) = adapter else { return self.adapt_by_family(adapter, strength, x, &y) };
        if strength == 0.0 || !is_plain(lora) {
            return self.adapt_by_family(adapter, strength, x, &y);
        }
        let down = without_window(&lora.down)?;
        let narrow = match x.device() {
            // MKL forms a product with few rows twice as fast as one with few columns, forward and, since autograd keeps
            // to the layouts of its operands, backward.
            Device::Cpu => down.f_mm(&x.f_transpose(0, 1)?)?.f_transpose(0, 1)?,
            // cuBLAS does not care, but a row of the transposed product may not start at a multiple of 16 bytes.
            _ => x.f_linear(&down, None::<&Tensor>)?,
        }; // [rows, rank]
        let factor = lora.scale * strength;
        let narrow = if factor == 1.0 { narrow } else { narrow.f_mul_scalar(factor)? };
        Ok(y.f_addmm_(&narrow, &without_window(&lora.up)?.f_transpose(0, 1)?)?)
    }

    /// What an adapter's own forward pass adds; it takes the rows of a 1×1 convolution as maps of one position.
    fn adapt_by_family(&self, adapter: &AnyAdapter<Tensor>, strength: f64, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        if self.geometry == Geometry::Linear {
            return self.adapt_whole(adapter, strength, x, y);
        }
        let map = |rows: &Tensor| rows.f_unsqueeze(-1)?.f_unsqueeze(-1);
        without_window(&self.adapt_whole(adapter, strength, &map(x)?, &map(y)?)?)
    }

    /// An adapter's own forward pass over the layer as it is.
    fn adapt_whole(&self, adapter: &AnyAdapter<Tensor>, strength: f64, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        let layer = Layer { weight: &self.weight()?, bias: self.bias.as_ref(), geometry: self.geometry };
        Ok(adapter.forward(&self.on, &layer, x, y, strength)?)
    }
}

/// Whether `scale · up · down` is all there is to it.
fn is_plain(lora: &Lora<Tensor>) -> bool {
    lora.mid.is_none() && lora.start.is_none() && lora.up_bias.is_none()
}

/// A matrix from the weight of a 1×1 convolution, `[m, n, 1, 1]`; a matrix as it is.
fn without_window(tensor: &Tensor) -> Result<Tensor> {
    match tensor.dim() {
        4 => Ok(tensor.f_squeeze_dim(-1)?.f_squeeze_dim(-1)?),
        _ => Ok(tensor.shallow_clone()),
    }
}

#[cfg(test)]
mod tests {
    use lora_core::{
        Draw, Purpose,
        adapter::{Axis, Direction, Dora, StrengthRule},
    };
    use tch::Reduction;

    use super::*;
    use crate::{Weights, nf4::Scheme, random};

    /// Sums of 64 products in 32 bits, in another order.
    const FLOAT_TOLERANCE: f64 = 1e-4;

    /// Central differences of step 1e-6 in 64 bits are good to about this much, relative to a gradient of size 1.
    const DIFFERENCE_TOLERANCE: f64 = 1e-7;

    fn drawn(sample: u32, shape: &[usize]) -> Tensor {
        random::normal(&mut Draw::new(1, Purpose::Init, 3, sample), shape).unwrap().to_kind(Kind::Double)
    }

    /// The gradient of every factor and of the input against central differences, at strength 0.6 and scale 1.7.
    fn check(layer: &mut Projection, x: &Tensor, down: &Tensor, up: &Tensor) {
        let leaves: Vec<Tensor> =
            [x, down, up].iter().map(|tensor| tensor.copy().f_set_requires_grad(true).unwrap()).collect();
        let mut loss = |leaves: &[Tensor]| {
            layer.detach_all();
            let lora = Lora::new(leaves[1].shallow_clone(), leaves[2].shallow_clone(), 1.7);
            layer.attach(AnyAdapter::Lora(lora), 0.6);
            let y = layer.forward(&leaves[0]).unwrap();
            y.f_tanh().unwrap().f_mse_loss(&y.f_ones_like().unwrap(), Reduction::Sum).unwrap()
        };
        let gradients = Tensor::f_run_backward(&[loss(&leaves)], &leaves, false, false).unwrap();
        for (which, gradient) in gradients.iter().enumerate() {
            for index in 0..leaves[which].numel() as i64 {
                let mut at = |step: f64| {
                    let _no_grad = tch::no_grad_guard();
                    let moved: Vec<Tensor> = leaves.iter().map(Tensor::copy).collect();
                    let _ = moved[which].view([-1]).get(index).f_add_scalar_(step).unwrap();
                    loss(&moved).double_value(&[])
                };
                let expected = (at(1e-6) - at(-1e-6)) / 2e-6;
                let actual = gradient.reshape([-1]).double_value(&[index]);
                let tolerance = DIFFERENCE_TOLERANCE * expected.abs().max(1.0);
                assert!((actual - expected).abs() < tolerance, "{which}.{index}: {actual} and {expected}");
            }
        }
    }

    #[test]
    fn gradients_of_an_adapted_linear_layer_equal_finite_differences() {
        for bias in [None, Some(drawn(9, &[5]))] {
            let mut layer = Projection::new("p", drawn(0, &[5, 4]), bias, Geometry::Linear).unwrap();
            check(&mut layer, &drawn(1, &[2, 3, 4]), &drawn(2, &[2, 4]), &drawn(3, &[5, 2]));
        }
    }

    #[test]
    fn gradients_of_an_adapted_convolution_equal_finite_differences() {
        let geometry = Geometry::Conv(ConvGeometry { stride: [2, 1], padding: [1, 1], dilation: [1, 1] });
        let mut layer = Projection::new("p", drawn(0, &[4, 3, 3, 3]), Some(drawn(9, &[4])), geometry).unwrap();
        check(&mut layer, &drawn(1, &[1, 3, 4, 4]), &drawn(2, &[2, 3, 3, 3]), &drawn(3, &[4, 2, 1, 1]));
    }

    #[test]
    fn a_row_that_is_looked_up_is_that_of_the_merged_table() {
        let scope = crate::Weights::from_tensors([("t.weight".to_owned(), drawn(0, &[7, 4]))]);
        let root = scope.root(&Torch::CPU.with_kind(Kind::Double));
        let scope = &root / "t";
        let mut table = Projection::over(&scope, scope.weight(&[7, 4]).unwrap());
        let lora = |sample| AnyAdapter::Lora(Lora::new(drawn(sample, &[2, 4]), drawn(sample + 1, &[7, 2]), 0.5));
        let ids = Tensor::from_slice(&[3i64, 0, 6, 3]).view([2, 2]);
        let bare = table.lookup(&ids).unwrap();
        table.attach(lora(2), 0.8);
        table.set_trained(Some(lora(4)));
        let merged = Tensor::f_embedding(&table.merged().unwrap().0, &ids, -1, false, false).unwrap();
        let looked_up = table.lookup(&ids).unwrap();
        assert_eq!(looked_up.size(), [2, 2, 4]);
        let error = |left: &Tensor, right: &Tensor| (left - right).abs().max().double_value(&[]);
        assert!(error(&looked_up, &merged) < 1e-12 && error(&looked_up, &bare) > 0.1);
    }

    #[test]
    fn several_adapters_add_up_and_merging_says_the_same() {
        let mut layer = Projection::new("p", drawn(0, &[5, 4]), Some(drawn(9, &[5])), Geometry::Linear).unwrap();
        let x = drawn(1, &[2, 3, 4]);
        let lora = |sample| AnyAdapter::Lora(Lora::new(drawn(sample, &[2, 4]), drawn(sample + 1, &[5, 2]), 0.5));
        let bare = layer.forward(&x).unwrap();
        layer.attach(lora(2), 0.8);
        layer.attach(lora(4), -1.5);
        layer.set_trained(Some(lora(6)));
        let adapted = layer.forward(&x).unwrap();
        let (weight, bias) = layer.merged().unwrap();
        let merged = x.f_linear(&weight, bias).unwrap();
        let error = |left: &Tensor, right: &Tensor| (left - right).abs().max().double_value(&[]);
        assert!(error(&adapted, &merged) < 1e-12 && error(&adapted, &bare) > 0.1);
        layer.set_trained(None);
        layer.detach_all();
        assert_eq!(layer.forward(&x).unwrap(), bare);
    }

    #[test]
    fn adapters_that_are_turned_down_to_nothing_leave_no_trace() {
        let x = drawn(1, &[2, 3, 4]);
        let layer = || Projection::new("p", drawn(0, &[5, 4]), Some(drawn(9, &[5])), Geometry::Linear).unwrap();
        let lora = |sample| Lora::new(drawn(sample, &[2, 4]), drawn(sample + 1, &[5, 2]), 0.5);
        let dora = || {
            AnyAdapter::Dora(Dora {
                direction: Direction::Lora(lora(4)),
                magnitude: drawn(8, &[5, 1]),
                axis: Axis::Output,
                rule: StrengthRule::Interpolate,
            })
        };
        let alone = |adapter, strength| {
            let mut layer = layer();
            layer.attach(adapter, strength);
            layer.forward(&x).unwrap()
        };
        let mut both = layer();
        both.attach_from(3, AnyAdapter::Lora(lora(2)), 1.0);
        both.attach_from(4, dora(), 0.0);
        assert_eq!(both.next_file(), 5);
        assert_eq!(both.forward(&x).unwrap(), alone(AnyAdapter::Lora(lora(2)), 1.0));
        both.set_strength(3, 0.0);
        both.set_strength(4, 0.7);
        assert_eq!(both.forward(&x).unwrap(), alone(dora(), 0.7));
        both.set_strength(4, 0.0);
        assert!(both.is_bare());
        assert_eq!(both.forward(&x).unwrap(), layer().forward(&x).unwrap());
    }

    #[test]
    fn an_adapter_that_reads_the_frozen_output_may_share_its_layer() {
        let mut layer = Projection::new("p", drawn(0, &[5, 4]), Some(drawn(9, &[5])), Geometry::Linear).unwrap();
        let x = drawn(1, &[2, 3, 4]);
        let lora = |sample| Lora::new(drawn(sample, &[2, 4]), drawn(sample + 1, &[5, 2]), 0.5);
        layer.attach(AnyAdapter::Lora(lora(2)), 0.8);
        layer.attach(
            AnyAdapter::Dora(Dora {
                direction: Direction::Lora(lora(4)),
                magnitude: drawn(8, &[5, 1]),
                axis: Axis::Output,
                rule: StrengthRule::Interpolate,
            }),
            0.7,
        );
        let adapted = layer.forward(&x).unwrap();
        let (weight, bias) = layer.merged().unwrap();
        let merged = x.f_linear(&weight, bias).unwrap();
        assert!((adapted - merged).abs().max().double_value(&[]) < 1e-12);
    }

    /// Outputs and the gradients of input and factors, of a layer with an adapter of these factors.
    fn adapted(layer: &mut Projection, family: &dyn Fn(Lora<Tensor>) -> AnyAdapter<Tensor>) -> Vec<Tensor> {
        let float = |sample, shape: &[usize]| drawn(sample, shape).to_kind(Kind::Float);
        let leaves = [float(1, &[2, 3, 64]), float(2, &[2, 64]), float(3, &[6, 2])]
            .map(|leaf| leaf.f_set_requires_grad(true).unwrap());
        let lora = Lora::new(leaves[1].shallow_clone(), leaves[2].shallow_clone(), 0.5);
        layer.set_trained(Some(family(lora)));
        let y = layer.forward(&leaves[0]).unwrap();
        let loss = y.f_tanh().unwrap().f_sum(Kind::Float).unwrap();
        let mut found = Tensor::f_run_backward(&[loss], &leaves, false, false).unwrap();
        found.push(y.detach());
        found
    }

    #[test]
    fn a_layer_in_4_bits_computes_as_its_matrix_does() {
        let dora = |lora: Lora<Tensor>| {
            let magnitude = drawn(8, &[6, 1]).to_kind(Kind::Float);
            let (direction, axis, rule) = (Direction::Lora(lora), Axis::Output, StrengthRule::Interpolate);
            AnyAdapter::Dora(Dora { direction, magnitude, axis, rule })
        };
        let loras: [&dyn Fn(Lora<Tensor>) -> AnyAdapter<Tensor>; 2] = [&AnyAdapter::Lora, &dora];
        for (scheme, family) in [(Scheme::Nf4, loras[0]), (Scheme::Nf4Double, loras[0]), (Scheme::Nf4, loras[1])] {
            let bias = drawn(9, &[6]);
            let named = [("p.weight", drawn(0, &[6, 64])), ("p.bias", bias)];
            let weights = Weights::from_tensors(named.map(|(name, tensor)| (name.to_owned(), tensor)));
            let weights = weights.quantised(Some(scheme));
            let mut layer = Projection::linear(&(weights.root(&Torch::CPU) / "p"), [6, 64], true).unwrap();
            assert!(layer.is_quantised());
            let bias = layer.bias().map(Tensor::shallow_clone);
            let mut full = Projection::new("p", layer.weight().unwrap(), bias, Geometry::Linear).unwrap();
            for (actual, expected) in adapted(&mut layer, family).iter().zip(adapted(&mut full, family)) {
                assert!(expected.abs().max().double_value(&[]) > 1e-2);
                let error = (actual - &expected).abs().max().double_value(&[]);
                assert!(error < FLOAT_TOLERANCE, "{error}");
            }
            let [merged, expected] = [&layer, &full].map(|layer| layer.merged().unwrap().0);
            assert_eq!(merged, expected);
        }
    }
}

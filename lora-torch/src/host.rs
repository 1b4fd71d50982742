//! Adapters on any `tch` model, without a change to it.
//!
//! A model made of `tch::nn` layers computes with the tensors of its `VarStore`. Writing `W + ΔW` into such a tensor, in
//! place and with gradients on, makes the model's next forward pass depend on the factors: `copy_` records its source, and
//! all handles of a variable share that record. It costs one ΔW a module and step; [`Projection`] does without.

use std::collections::HashMap;

use lora_core::Geometry;
use tch::Tensor;

use crate::{Error, Projection, Projections, Result, backend::copied};

/// The layers of a foreign model that can carry adapters.
///
/// Its [`Projections`] take adapters as those of any other model; [`write`](Self::write) brings them into the model before
/// each forward pass.
#[derive(Debug)]
pub struct Host {
    layers: Vec<Hosted>,
}

#[derive(Debug)]
struct Hosted {
    /// The layer with its own copy of the base.
    projection: Projection,
    /// The model's variables.
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Host {
    /// Takes hold of a model's variables, for example `store.variables()`, and freezes all of them.
    ///
    /// `select` is asked about every variable `NAME.weight` with its shape, in the order of names, and says how the layer
    /// applies it or that it is no target.
    ///
    /// # Errors
    /// If a selected weight has the wrong number of axes.
    pub fn new(
        variables: HashMap<String, Tensor>,
        select: &mut dyn FnMut(&str, &[i64]) -> Option<Geometry>,
    ) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        for variable in variables.values() {
            let _ = variable.f_set_requires_grad(false)?;
        }
        let mut names: Vec<&str> = variables.keys().filter_map(|name| name.strip_suffix(".weight")).collect();
        names.sort_unstable();
        let mut layers = Vec::new();
        for path in names {
            let weight = &variables[&format!("{path}.weight")];
            let Some(geometry) = select(path, &weight.size()) else { continue };
            let bias = variables.get(&format!("{path}.bias"));
            let base_bias = bias.map(copied).transpose()?;
            layers.push(Hosted {
                projection: Projection::new(path, copied(weight)?, base_bias, geometry)?,
                weight: weight.shallow_clone(),
                bias: bias.map(Tensor::shallow_clone),
            });
        }
        Ok(Self { layers })
    }

    /// Writes the base with all adapters into the model's variables; to be called before each forward pass.
    ///
    /// # Errors
    /// If an adapter wants to change a bias that the model does not have.
    pub fn write(&self) -> Result<()> {
        for Hosted { projection, weight, bias } in &self.layers {
            let (merged_weight, merged_bias) = projection.merged()?;
            overwrite(weight, &merged_weight)?;
            match (bias, merged_bias) {
                (Some(variable), Some(merged)) => overwrite(variable, &merged)?,
                (None, Some(_)) => {
                    let reason = format!("an adapter changes the bias of `{}`, which has none", projection.path());
                    return Err(Error::Config { option: "targets", reason });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Writes the base back, bit for bit.
    pub fn restore(&self) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        for Hosted { projection, weight, bias } in &self.layers {
            overwrite(weight, &projection.weight()?)?;
            if let (Some(variable), Some(base)) = (bias, projection.bias()) {
                overwrite(variable, base)?;
            }
        }
        Ok(())
    }
}

impl Projections for Host {
    fn projections(&mut self) -> Vec<&mut Projection> {
        self.layers.iter_mut().map(|layer| &mut layer.projection).collect()
    }
}

/// Gives a variable new values and, with grad mode on, their history in place of the one it had.
fn overwrite(variable: &Tensor, value: &Tensor) -> Result<()> {
    let mut variable = variable.shallow_clone().f_detach_()?;
    variable.f_copy_(value)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use lora_core::{AnyAdapter, ConvGeometry, Draw, Purpose, adapter::Lora};
    use tch::{Device, Kind, Reduction, nn, nn::Module};

    use super::*;
    use crate::random;

    /// 64-bit arithmetic in another order.
    const TOLERANCE: f64 = 1e-12;

    fn drawn(sample: u32, shape: &[usize]) -> Tensor {
        let values = random::normal(&mut Draw::new(2, Purpose::Init, 7, sample), shape).unwrap();
        values.to_kind(Kind::Double).f_set_requires_grad(true).unwrap()
    }

    fn error(left: &Tensor, right: &Tensor) -> f64 {
        (left - right).abs().max().double_value(&[])
    }

    #[test]
    fn gradients_through_a_foreign_model_equal_those_through_projections() {
        let mut store = nn::VarStore::new(Device::Cpu);
        let root = store.root();
        let conv = nn::conv2d(&root / "conv", 3, 4, 3, nn::ConvConfig { padding: 1, ..Default::default() });
        let linear = nn::linear(&root / "linear", 4, 5, Default::default());
        store.double();
        let geometry = ConvGeometry { stride: [1, 1], padding: [1, 1], dilation: [1, 1] };
        let mut host = Host::new(store.variables(), &mut |path, _| match path {
            "conv" => Some(Geometry::Conv(geometry)),
            _ => Some(Geometry::Linear),
        })
        .unwrap();
        let before = [conv.ws.copy(), linear.ws.copy()];

        let x = drawn(0, &[2, 3, 6, 6]).detach();
        let factors = [drawn(1, &[2, 3, 3, 3]), drawn(2, &[4, 2, 1, 1]), drawn(3, &[2, 4]), drawn(4, &[5, 2])];
        let share = |index: usize| factors[index].shallow_clone();
        for projection in host.projections() {
            let (down, up) = if projection.path() == "conv" { (0, 1) } else { (2, 3) };
            projection.set_trained(Some(AnyAdapter::Lora(Lora::new(share(down), share(up), 0.7))));
        }
        let foreign = |x: &Tensor| linear.forward(&conv.forward(x).relu().mean_dim([2, 3].as_slice(), false, None));
        let loss = |y: Tensor| y.mse_loss(&y.zeros_like().detach(), Reduction::Mean);
        let gradients = |loss: &Tensor| Tensor::f_run_backward(&[loss], &factors, false, false).unwrap();

        let mut through_host = Vec::new();
        for _ in 0..2 {
            host.write().unwrap(); // the second time over the history of the first
            through_host = gradients(&loss(foreign(&x)));
        }
        let [conv_layer, linear_layer] = [&host.layers[0].projection, &host.layers[1].projection];
        let hidden = conv_layer.forward(&x).unwrap().relu().mean_dim([2, 3].as_slice(), false, None);
        let through_projections = gradients(&loss(linear_layer.forward(&hidden).unwrap()));
        for (left, right) in through_host.iter().zip(&through_projections) {
            assert!(right.abs().max().double_value(&[]) > 1e-3);
            assert!(error(left, right) < TOLERANCE, "{}", error(left, right));
        }

        host.restore().unwrap();
        assert_eq!([conv.ws.shallow_clone(), linear.ws.shallow_clone()], before);
        assert!(!conv.ws.requires_grad());
    }
}

//! The spelling of sd-scripts and LyCORIS, which most programs read; ComfyUI's dotted one differs in the module part alone.
//!
//! UNet modules of SDXL are written under their LDM names, as sd-scripts does, all others under diffusers'.

use std::collections::BTreeMap;

use super::{Writer, Written, alpha, filled, number, rank_and_scale};
use crate::{
    AnyAdapter, Array, Backend, Cpu, Part, Result,
    adapter::{Adapter, Axis, Direction, Dora, Ia3Kind, KronFactor, Lokr, Oft, OftSide},
    format::{
        AdaptedModule, Component, Dialect, Dtype, Family, Role, TensorData, key, ldm::UnetNames, names::flattened,
        training_metadata,
    },
};

impl Writer<'_> {
    /// Under `lora_unet_…`, with underscores; in ComfyUI's dialect under `diffusion_model.…`, with dots and LDM names.
    pub(super) fn kohya(&self, metadata: &BTreeMap<String, String>) -> Result<Written> {
        let is_dotted = self.dialect == Dialect::Comfy;
        let sdxl = *self.family == Family::Sdxl;
        let names = if sdxl { UnetNames::sdxl() } else { UnetNames::sd() };
        let mut tensors = Vec::new();
        for module in self.modules {
            let name = match is_dotted {
                true => self.dotted_name(module, &names, sdxl),
                false => self.flat_name(module, &names, sdxl),
            };
            let name = name.ok_or_else(|| self.unwritable(module, "it belongs to no part of Stable Diffusion"))?;
            self.module(module, &name, &mut tensors)?;
        }
        let mut metadata = filled(metadata, training_metadata::defaults(self.family, &self.summary()));
        if !is_dotted {
            training_metadata::add_hashes(self.path, &tensors, &mut metadata)?;
        }
        Ok((tensors, metadata))
    }

    fn flat_name(&self, module: &AdaptedModule, names: &UnetNames, sdxl: bool) -> Option<String> {
        // A bound of zero means "no turn" under sd-scripts' prefix and "no bound" under LyCORIS'.
        let never_turns = matches!(&module.adapter,
            AnyAdapter::Oft(oft) if oft.side == OftSide::Rows { bound: Some(0.0) });
        if never_turns && module.component == Component::Unet {
            return Some(format!("oft_unet_{}", module.path.replace('.', "_")));
        }
        if sdxl && module.component == Component::Unet {
            return Some(format!("lora_unet_{}", names.ldm_path(&module.path)?.replace('.', "_")));
        }
        flattened(module.component, &module.path, sdxl)
    }

    fn dotted_name(&self, module: &AdaptedModule, names: &UnetNames, sdxl: bool) -> Option<String> {
        let encoder = match (module.component, self.family) {
            (Component::Unet, _) => return Some(format!("diffusion_model.{}", names.ldm_path(&module.path)?)),
            (Component::TextEncoder, Family::Sd2) => "clip_h",
            (Component::TextEncoder, _) => "clip_l",
            (Component::TextEncoder2, _) if sdxl => "clip_g",
            _ => return None,
        };
        Some(format!("text_encoders.{encoder}.transformer.{}", module.path))
    }

    /// The tensors of one module.
    pub(super) fn module(
        &self,
        module: &AdaptedModule,
        name: &str,
        tensors: &mut Vec<(String, TensorData<'static>)>,
    ) -> Result<()> {
        let still;
        let module = match &module.adapter {
            // Elsewhere than under sd-scripts' prefix a bound of 0 is none: what never turns becomes a turn by nothing.
            AnyAdapter::Oft(oft)
                if oft.side == (OftSide::Rows { bound: Some(0.0) }) && !name.starts_with("oft_unet_") =>
            {
                let blocks = Array::full(&*oft.blocks.shape, 0.0);
                let oft = Oft { blocks, rescale: oft.rescale.clone(), side: OftSide::Rows { bound: None } };
                still = AdaptedModule { adapter: AnyAdapter::Oft(oft), ..module.clone() };
                &still
            }
            _ => module,
        };
        let mut put = |suffix: &str, data: TensorData<'static>| tensors.push((format!("{name}.{suffix}"), data));
        let unwritable = |reason| self.unwritable(module, reason);
        // What has its own words in this dialect.
        match &module.adapter {
            AnyAdapter::Full(full) => {
                let norm = module.weight.len() == 1;
                if let Some(diff) = &full.diff {
                    put(if norm { "w_norm" } else { "diff" }, self.tensor(module, diff)?);
                }
                if let Some(diff) = &full.diff_bias {
                    put(if norm { "b_norm" } else { "diff_b" }, self.tensor(module, diff)?);
                }
                return Ok(());
            }
            AnyAdapter::Ia3(ia3) => {
                if ia3.kind == Ia3Kind::Factor {
                    return Err(unwritable("peft's (IA)³ also multiplies biases and knows no strength"));
                }
                let on_input = i64::from(ia3.axis == Axis::Input);
                put("weight", self.tensor(module, &ia3.vector)?);
                put("on_input", TensorData::new(Dtype::I64, [], on_input.to_le_bytes().to_vec())?);
                return Ok(());
            }
            AnyAdapter::Oft(oft) => {
                let OftSide::Rows { bound } = oft.side else {
                    return Err(unwritable("peft's OFT turns inputs, this dialect's turns outputs"));
                };
                put("alpha", number(self.constraint(module, bound))?);
            }
            AnyAdapter::Boft(boft) => put("alpha", number(self.constraint(module, boft.bound))?),
            other => {
                if let Some((rank, scale)) = rank_and_scale(other) {
                    put("alpha", number(alpha(scale, rank))?);
                } else if Adapter::<Cpu>::scale(other) != 1.0 {
                    return Err(unwritable("two whole Kronecker factors take no scale in this dialect"));
                }
            }
        }
        for (part, array) in Adapter::<Cpu>::factors(&module.adapter) {
            match part {
                // In front of the scale here, behind it there.
                Part::UpBias => {
                    let scale = Adapter::<Cpu>::scale(&module.adapter);
                    put("diff_b", self.tensor(module, &Cpu.scale(array, scale)?)?);
                }
                Part::Magnitude => {
                    if let AnyAdapter::Dora(dora) = &module.adapter {
                        put("dora_scale", self.tensor(module, &magnitude(dora, array, module.weight.len())?)?);
                    }
                }
                part => put(key::suffix_of(Role::Factor(part)), self.tensor(module, array)?),
            }
        }
        Ok(())
    }

    /// The `alpha` of OFT: the bound as a share of the outputs, 0 for none.
    fn constraint(&self, module: &AdaptedModule, bound: Option<f64>) -> f64 {
        let out = module.weight.first().copied().unwrap_or(1);
        bound.map_or(0.0, |bound| bound / out as f64)
    }

    /// What the metadata says about the adapters as a whole.
    pub(super) fn summary(&self) -> training_metadata::Summary {
        let plain = |adapter: &AnyAdapter<Array>| matches!(adapter, AnyAdapter::Lora(lora) if lora.mid.is_none());
        let mut summary = training_metadata::Summary {
            network_module: if self.modules.iter().all(|module| plain(&module.adapter)) {
                "networks.lora"
            } else {
                "lycoris.kohya"
            },
            ..Default::default()
        };
        for module in self.modules {
            if let Some((rank, scale)) = rank_and_scale(&module.adapter) {
                let pair = (rank, alpha(scale, rank));
                let is_kernel = matches!(module.weight[..], [_, _, kh, kw] if kh * kw > 1);
                let pairs = if is_kernel { &mut summary.kernels } else { &mut summary.pairs };
                if !pairs.contains(&pair) {
                    pairs.push(pair);
                }
            }
        }
        summary
    }
}

/// Magnitudes as LyCORIS lays them out: `[out, 1, ..]` or `[1, in, ..]`.
fn magnitude(dora: &Dora<Array>, array: &Array, axes: usize) -> Result<Array> {
    let mut shape = vec![1; axes.max(2)];
    shape[usize::from(dora.axis == Axis::Input)] = array.values.len();
    Cpu.reshape(array, &shape)
}

/// The rank that LyCORIS divides by; `None` where both factors are whole.
pub(super) fn lokr_rank(lokr: &Lokr<Array>) -> Option<usize> {
    let rank = |factor: &KronFactor<Array>| match factor {
        KronFactor::Whole(_) => None,
        KronFactor::Product { b, .. } | KronFactor::Tucker { b, .. } => b.shape.first().copied(),
    };
    rank(&lokr.w2).or_else(|| rank(&lokr.w1))
}

/// Whether the direction of a [`Dora`] is plain LoRA.
pub(super) fn plain_direction(dora: &Dora<Array>) -> Option<&crate::adapter::Lora<Array>> {
    match &dora.direction {
        Direction::Lora(lora) if lora.mid.is_none() => Some(lora),
        _ => None,
    }
}

//! The families without low-rank factors: full differences, (IA)³, OFT and BOFT, of LyCORIS, sd-scripts and peft.

use super::{Group, Kind, elements};
use crate::{
    AnyAdapter, Array, Backend, Cpu, Part, Result,
    adapter::{Axis, Boft, Cayley, Full, Ia3, Ia3Kind, Oft, OftSide, oft},
    format::Role,
};

impl Group<'_> {
    pub(super) fn full(&self) -> Result<AnyAdapter<Array>> {
        let (weight, bias) = (Role::Factor(Part::Diff), Role::Factor(Part::DiffBias));
        let kind = self.kind()?;
        let diff = if kind == Some(Kind::Full) { self.take(weight)? } else { None };
        let long = |shape: &[usize]| shape.iter().copied().filter(|length| *length != 1).collect::<Vec<_>>();
        if let Some(diff) = diff.as_ref().filter(|diff| long(&diff.shape) != long(&self.module.weight)) {
            return Err(self.misfit(weight, diff, None, "a difference has the shape of the weight"));
        }
        let diff = diff.map(|diff| Cpu.reshape(&diff, &self.module.weight)).transpose()?;
        let diff_bias = self.take(bias)?;
        let out = self.module.weight.first().copied().unwrap_or(0);
        if let Some(diff) = diff_bias.as_ref().filter(|diff| elements(diff) != out) {
            return Err(self.misfit(bias, diff, None, "its length is not the module's output"));
        }
        let diff_bias = diff_bias.map(|diff| Cpu.reshape(&diff, &[out])).transpose()?;
        Ok(AnyAdapter::Full(Full { diff, diff_bias }))
    }

    pub(super) fn ia3(&self) -> Result<AnyAdapter<Array>> {
        let vector = self.need(Role::Weight)?;
        let on_input = self.number(Role::OnInput)?.unwrap_or(0.0);
        let axis = if on_input > 0.0 { Axis::Input } else { Axis::Output };
        self.check_length(Role::Weight, &vector, axis)?;
        Ok(AnyAdapter::Ia3(Ia3 { vector, axis, kind: Ia3Kind::Offset }))
    }

    pub(super) fn peft_ia3(&self) -> Result<AnyAdapter<Array>> {
        let vector = self.need(Role::PeftIa3)?;
        let [out, _] = self.sizes();
        let channels = self.module.weight.get(1).copied().unwrap_or(1);
        // `[out, 1]`, or `[1, in]` for feed-forward modules; convolutions carry two more unit axes.
        let axis = match vector.shape.first() {
            Some(&1) if channels == elements(&vector) && (out != 1 || channels == 1) => Axis::Input,
            _ => Axis::Output,
        };
        self.check_length(Role::PeftIa3, &vector, axis)?;
        Ok(AnyAdapter::Ia3(Ia3 { vector, axis, kind: Ia3Kind::Factor }))
    }

    pub(super) fn oft(&self) -> Result<AnyAdapter<Array>> {
        let role = Role::Factor(Part::OftBlocks);
        let blocks = self.need(role)?;
        let out = self.module.weight.first().copied().unwrap_or(0);
        let rescale = self.take(Role::Factor(Part::Rescale))?;
        if let Some(rescale) = rescale.as_ref().filter(|rescale| elements(rescale) != out) {
            let rescale_role = Role::Factor(Part::Rescale);
            return Err(self.misfit(rescale_role, rescale, None, "its length is not the module's output"));
        }
        self.refuse_magnitude("OFT")?;
        let bound = self.alpha()?.map(|alpha| alpha * out as f64);
        match blocks.shape[..] {
            [count, size, width] if size == width && count.checked_mul(size) == Some(out) && out > 0 => {
                // sd-scripts always bounds, LyCORIS only by a positive number; the prefix tells them apart.
                let bound = bound.filter(|bound| self.spelling.starts_with("oft_unet_") || *bound > 0.0);
                Ok(AnyAdapter::Oft(Oft { blocks, rescale, side: OftSide::Rows { bound } }))
            }
            [stages, count, size, width] if oft::is_butterfly([stages, count, size, width], out) => {
                Ok(AnyAdapter::Boft(Boft { blocks, rescale, bound: bound.filter(|bound| *bound > 0.0) }))
            }
            _ => Err(self.misfit(role, &blocks, None, "the blocks do not turn the module's output")),
        }
    }

    pub(super) fn peft_oft(&self) -> Result<AnyAdapter<Array>> {
        let blocks = self.need(Role::PeftOft)?;
        let [_, inner] = self.sizes();
        let fits = match blocks.shape[..] {
            [count, packed] => {
                let tiles = |size: usize| count.checked_mul(size) == Some(inner) || count == 1 && inner % size == 0;
                oft::block_size(packed).is_some_and(tiles)
            }
            _ => false,
        };
        if !fits {
            return Err(self.misfit(Role::PeftOft, &blocks, None, "the blocks do not tile the module's input"));
        }
        let cayley = match self.config.and_then(|config| config.neumann_terms) {
            Some(terms) => Cayley::Neumann(terms),
            None => Cayley::Exact,
        };
        Ok(AnyAdapter::Oft(Oft { blocks, rescale: None, side: OftSide::Columns(cayley) }))
    }
}

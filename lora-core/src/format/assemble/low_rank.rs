//! LoRA, LoCon, Tucker, DoRA over them, embeddings, and the starts that peft took out of the base weight.

use faer::Mat;

use super::{Group, Kind, elements, flat};
use crate::{
    AnyAdapter, Array, Backend, Cpu, Error, Part, Result,
    adapter::{Direction, Dora, Full, Lora, Start},
    backend::decompose::qr,
    format::{Fault, ModuleKind, PeftStart, Role, header::count},
};

impl Group<'_> {
    pub(super) fn low_rank(&self, kind: Kind, result: &mut super::Assembled) -> Result<AnyAdapter<Array>> {
        let (down_role, up_role) = match kind {
            Kind::Embedding => (Role::EmbeddingDown, Role::EmbeddingUp),
            _ => (Role::Factor(Part::Down), Role::Factor(Part::Up)),
        };
        let (mut down, mut up) = (self.need(down_role)?, self.need(up_role)?);
        let rank = self.rank(down_role, &down)?;
        let fans_in = self.config.is_some_and(|config| config.fan_in_fan_out) && self.module.kind == ModuleKind::Linear;
        result.turned = kind == Kind::Embedding || fans_in;
        if result.turned {
            let turned = |array: &Array| Cpu.transpose(&flat(array)?);
            (down, up) = (turned(&up)?, turned(&down)?);
        }
        // From here on as for a weight `[out, in, ..]`.
        let [out, inner] = self.sizes();
        let (down_role, up_role) = if result.turned { (up_role, down_role) } else { (down_role, up_role) };
        let mid = self.take(Role::Factor(Part::Mid))?;
        let up_rank = elements(&up) / up.shape[0].max(1);
        match &mid {
            None if up_rank != down.shape[0] => {
                return Err(self.misfit(up_role, &up, Some((down_role, &down)), "the two halves have different ranks"));
            }
            None if elements(&down) != rank * inner => {
                return Err(self.misfit(down_role, &down, Some((up_role, &up)), "its input is not the module's"));
            }
            None => {}
            Some(mid) => {
                let channels = self.module.weight.get(1).copied().unwrap_or(0);
                let kernel = inner / channels.max(1);
                let fits = matches!(mid.shape[..], [p, q, ref rest @ ..]
                    if p == up_rank && q == down.shape[0] && count(rest) == kernel && rest.len() == 2);
                if !fits {
                    let mid_role = Role::Factor(Part::Mid);
                    return Err(self.misfit(mid_role, mid, Some((down_role, &down)), "the core does not fit"));
                }
                if elements(&down) != down.shape[0] * channels {
                    return Err(self.misfit(down_role, &down, Some((up_role, &up)), "its input is not the module's"));
                }
            }
        }
        if up.shape[0] != out {
            return Err(self.misfit(up_role, &up, Some((down_role, &down)), "its output is not the module's"));
        }
        let scale = self.scale(rank, result)?;
        if let Some(addition) = self.old_addition()? {
            let product = Cpu.matmul(&flat(&up)?, &flat(&down)?)?;
            let sum = Cpu.add(&product, &Cpu.reshape(&addition, &product.shape)?)?;
            let diff = Cpu.reshape(&Cpu.scale(&sum, scale)?, &self.module.weight)?;
            return Ok(AnyAdapter::Full(Full { diff: Some(diff), diff_bias: None }));
        }
        let up_bias = self.take(Role::Factor(Part::UpBias))?;
        if let Some(bias) = up_bias.as_ref().filter(|bias| elements(bias) != out) {
            return Err(self.misfit(Role::Factor(Part::UpBias), bias, None, "its length is not the module's output"));
        }
        let start = self.start(rank, scale)?;
        let lora = Lora { down, up, mid, up_bias, start, scale };
        match self.magnitude(result.turned)? {
            None => Ok(AnyAdapter::Lora(lora)),
            Some((magnitude, axis, rule)) => {
                Ok(AnyAdapter::Dora(Dora { direction: Direction::Lora(lora), magnitude, axis, rule }))
            }
        }
    }

    /// What PiSSA and OLoRA took out of the base weight, as a frozen product under the same scale.
    fn start(&self, rank: usize, scale: f64) -> Result<Option<Start<Array>>> {
        let start = self.config.map_or(PeftStart::None, |config| config.start);
        if start == PeftStart::None {
            return Ok(None);
        }
        let key = self.keys.values().next().copied().unwrap_or_default();
        let needs_base = || {
            let reason = "its factors started from numbers of the base weight";
            self.fault(Fault::NeedsBase { key: key.to_owned(), reason })
        };
        let weight = self.base.read(self.component, &format!("{}.weight", self.path))?.ok_or_else(needs_base)?;
        let weight = flat(&weight)?;
        if rank > weight.shape[0].min(weight.shape[1]) || scale == 0.0 {
            let reason = "no such start of that rank and scale exists for this weight".to_owned();
            return Err(self.fault(Fault::Unsupported { key: key.to_owned(), reason }));
        }
        let (up, down) = match start {
            PeftStart::Pissa => leading_product(&weight, rank, scale)
                .map_err(|error| error.in_module(self.file.path(), &self.component.with(self.path)))?,
            _ => {
                let (q, r) = qr(&weight)?;
                (Cpu.narrow(&q, 1, 0, rank)?, Cpu.narrow(&r, 0, 0, rank)?)
            }
        };
        Ok(Some(Start { down, up }))
    }

    /// The dense or sparse addition to `up·down` of very old LyCORIS files.
    fn old_addition(&self) -> Result<Option<Array>> {
        let size = count(&self.module.weight);
        if let Some(dense) = self.take(Role::Bias)?.filter(|bias| elements(bias) == size && bias.shape.len() > 1) {
            return Ok(Some(dense));
        }
        let Some(indices_key) = self.keys.get(&Role::BiasIndices) else { return Ok(None) };
        let indices = self.file.doubles(indices_key)?;
        let values = self.need(Role::BiasValues)?;
        let shape = match self.keys.get(&Role::BiasSize) {
            Some(key) => self.file.doubles(key)?.iter().map(|length| *length as usize).collect(),
            None => self.sizes().to_vec(),
        };
        let misfit = || self.misfit(Role::BiasValues, &values, None, "the sparse addition does not fit");
        let count = values.values.len();
        if shape.iter().try_fold(1_usize, |all, length| all.checked_mul(*length)) != Some(size)
            || indices.len() != count * shape.len()
        {
            return Err(misfit());
        }
        let mut dense = Array::full([size], 0.0);
        for (entry, value) in values.values.iter().enumerate() {
            // `[axes, count]`, as torch lays out sparse indices.
            let place = shape.iter().enumerate().try_fold(0_usize, |place, (axis, length)| {
                let index = indices[axis * count + entry];
                (index >= 0.0 && index < *length as f64).then(|| place * length + index as usize)
            });
            dense.values[place.ok_or_else(misfit)?] += value;
        }
        Ok(Some(dense))
    }
}

/// The first `rank` singular triplets of a matrix as two factors, `U·S / scale` and `Vᵀ`.
///
/// In `f64`: the peer's factors were trained from its own decomposition, and what the two differ by stays in the weight.
fn leading_product(weight: &Array, rank: usize, scale: f64) -> Result<(Array, Array)> {
    let &[rows, columns] = &weight.shape[..] else {
        return Err(Error::Shapes { operation: "svd", shapes: vec![weight.shape.clone()] });
    };
    let matrix = Mat::from_fn(rows, columns, |row, column| f64::from(weight.values[row * columns + column]));
    let failed = |_| Error::Numeric {
        operation: "svd",
        reason: "the iteration for the singular values of the base weight does not converge".to_owned(),
    };
    let svd = matrix.thin_svd().map_err(failed)?;
    let (left, values, right) = (svd.U(), svd.S().column_vector(), svd.V());
    let up = (0..rows).flat_map(|row| (0..rank).map(move |k| (left[(row, k)] * values[k] / scale) as f32)).collect();
    let down = (0..rank).flat_map(|k| (0..columns).map(move |column| right[(column, k)] as f32)).collect();
    Ok((Array::new([rows, rank], up)?, Array::new([rank, columns], down)?))
}

//! The tensors of one module become adapters: which family they are, whether they fit, and what their scale is.
//!
//! Follows `docs/formats.md` §4 and §5. Nothing is left over: a tensor takes part in an adapter, replaces one of the
//! base, or is an error that names its key.

use std::collections::BTreeMap;

use super::{
    BaseModel, Component, Dtype, Fault, Misfit, Module, ModuleKind, PeftConfig, PeftKind, PeftStart, Role, TensorFile,
    key,
};
use crate::{
    AnyAdapter, Array, Backend, Cpu, Error, Part, Result,
    adapter::{
        Axis, Boft, Cayley, Direction, Dora, Full, Glora, GloraOrder, Ia3, Ia3Kind, KronFactor, Loha, Lokr, Lora, Oft,
        OftSide, Start, StrengthRule,
    },
    backend::decompose::{qr, svd},
};

/// The tensors of one module, by role.
pub(super) struct Group<'a> {
    pub component: Component,
    /// The path of the module in the base.
    pub path: &'a str,
    pub module: &'a Module,
    /// The module as the file spells it.
    pub spelling: &'a str,
    pub keys: BTreeMap<Role, &'a str>,
    pub file: &'a TensorFile,
    pub base: &'a BaseModel,
    pub config: Option<&'a PeftConfig>,
}

/// What a group amounts to.
#[derive(Default)]
pub(super) struct Assembled {
    pub adapters: Vec<AnyAdapter<Array>>,
    pub replacements: Vec<Replacement>,
    /// Factors are stored for the weight turned over (embeddings, `fan_in_fan_out`).
    pub turned: bool,
    /// The scale is zero because the file says so.
    pub alpha_is_zero: Option<String>,
}

/// A tensor of the base, or rows of one, that a file brings whole; no strength acts on it but 0, which leaves it out.
#[derive(Debug, Clone)]
pub struct Replacement {
    /// The part of the model.
    pub component: Component,
    /// The tensor, `module.weight` or `module.bias`.
    pub tensor: String,
    /// Its values; `[n, width]` with [`rows`](Self::rows).
    pub value: Array,
    /// The rows that are replaced, in the order of the values; `None` for all.
    pub rows: Option<Vec<usize>>,
    /// Whether the adapters of the module act on the new values rather than being overwritten by them.
    pub under_adapters: bool,
    /// How the file stores it.
    pub dtype: Dtype,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    LowRank,
    Embedding,
    Loha,
    Lokr,
    Glora,
    Full,
    Ia3,
    Oft,
    PeftIa3,
    PeftOft,
}

/// The family that a role belongs to; `None` for those that several share.
fn kind_of(role: Role) -> Option<Kind> {
    Some(match role {
        Role::Factor(part) => match part {
            Part::Down | Part::Up | Part::Mid | Part::UpBias => Kind::LowRank,
            Part::HadaW1A | Part::HadaW1B | Part::HadaW2A | Part::HadaW2B | Part::HadaT1 | Part::HadaT2 => Kind::Loha,
            Part::KronW1 | Part::KronW1A | Part::KronW1B | Part::KronT1 => Kind::Lokr,
            Part::KronW2 | Part::KronW2A | Part::KronW2B | Part::KronT2 => Kind::Lokr,
            Part::GloraA1 | Part::GloraA2 | Part::GloraB1 | Part::GloraB2 => Kind::Glora,
            Part::OftBlocks | Part::Rescale => Kind::Oft,
            Part::Diff => Kind::Full,
            _ => return None,
        },
        Role::EmbeddingDown | Role::EmbeddingUp => Kind::Embedding,
        Role::GloraCore => Kind::Glora,
        Role::OnInput => Kind::Ia3,
        Role::PeftIa3 => Kind::PeftIa3,
        Role::PeftOft => Kind::PeftOft,
        _ => return None,
    })
}

impl Group<'_> {
    /// The adapters of this module.
    pub(super) fn assemble(&self) -> Result<Assembled> {
        self.refuse_unsupported()?;
        let mut result = Assembled::default();
        let kind = self.kind()?;
        if let Some(kind) = kind {
            let first = self.keys.iter().find(|(role, _)| kind_of(**role) == Some(kind)).map_or("", |(_, key)| *key);
            self.refuse_if_not_adaptable(kind, first)?;
            let adapter = match kind {
                Kind::LowRank | Kind::Embedding => self.low_rank(kind, &mut result)?,
                Kind::Loha => self.loha(&mut result)?,
                Kind::Lokr => self.lokr(&mut result)?,
                Kind::Glora => self.glora(&mut result)?,
                Kind::Full => self.full()?,
                Kind::Ia3 => self.ia3()?,
                Kind::Oft => self.oft()?,
                Kind::PeftIa3 => self.peft_ia3()?,
                Kind::PeftOft => self.peft_oft()?,
            };
            result.adapters.push(adapter);
        }
        // A difference of the bias may stand beside any family.
        if kind != Some(Kind::Full) && self.has(Role::Factor(Part::DiffBias)) {
            result.adapters.push(self.full()?);
        }
        self.replacements(kind, &mut result)?;
        if result.adapters.is_empty() && result.replacements.is_empty() {
            let key = self.keys.values().next().copied().unwrap_or_default().to_owned();
            return Err(self.fault(Fault::Alone { key }));
        }
        Ok(result)
    }

    fn kind(&self) -> Result<Option<Kind>> {
        let mut kinds = self.keys.iter().filter_map(|(role, key)| Some((kind_of(*role)?, *key)));
        let Some((kind, first)) = kinds.next() else { return Ok(None) };
        match kinds.find(|(other, _)| *other != kind) {
            None => Ok(Some(kind)),
            Some((_, second)) => Err(self.fault(Fault::TwoFamilies {
                module: self.spelling.to_owned(),
                first: first.to_owned(),
                second: second.to_owned(),
            })),
        }
    }

    fn refuse_unsupported(&self) -> Result<()> {
        for (role, reason) in [
            (
                Role::TLora,
                "a T-LoRA file lacks the values that its factors started from, so its update cannot be computed; ask \
                 for a version converted to plain LoRA",
            ),
            (Role::GloraCore, "GLoRA with a core is written by no program and has no known meaning"),
            (Role::ReshapeWeight, "it changes the size of a weight, so the base would no longer be the same model"),
        ] {
            if let Some(key) = self.keys.get(&role) {
                return Err(self.fault(Fault::Unsupported { key: (*key).to_owned(), reason: reason.to_owned() }));
            }
        }
        Ok(())
    }

    fn refuse_if_not_adaptable(&self, kind: Kind, key: &str) -> Result<()> {
        let what = match self.module.kind {
            ModuleKind::Linear | ModuleKind::Conv | ModuleKind::Embedding => return Ok(()),
            ModuleKind::Norm if kind == Kind::Full => return Ok(()),
            ModuleKind::Norm => "a norm layer",
            ModuleKind::Other => "no linear layer or convolution",
        };
        Err(self.fault(Fault::NotAdaptable {
            key: key.to_owned(),
            module: self.path.to_owned(),
            base: self.module.weight.clone(),
            kind: what,
        }))
    }

    // --- families

    fn low_rank(&self, kind: Kind, result: &mut Assembled) -> Result<AnyAdapter<Array>> {
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
                    if p == up_rank && q == down.shape[0] && rest.iter().product::<usize>() == kernel && rest.len() == 2);
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
        let unsupported =
            |reason: &str| self.fault(Fault::Unsupported { key: key.to_owned(), reason: reason.to_owned() });
        let weight = self.base.read(self.component, &format!("{}.weight", self.path))?;
        let weight = weight.ok_or_else(|| unsupported("its start needs the numbers of the base weight"))?;
        let weight = flat(&weight)?;
        if rank > weight.shape[0].min(weight.shape[1]) || scale == 0.0 {
            return Err(unsupported("no such start of that rank and scale exists for this weight"));
        }
        let (up, down) = match start {
            PeftStart::Pissa => {
                let svd = svd(&weight)?;
                let left = Cpu.narrow(&svd.left, 1, 0, rank)?; // [out, rank]
                let values = Cpu.reshape(&Cpu.narrow(&svd.values, 0, 0, rank)?, &[1, rank])?;
                (Cpu.scale(&Cpu.mul(&left, &values)?, 1.0 / scale)?, Cpu.narrow(&svd.right, 0, 0, rank)?)
            }
            _ => {
                let (q, r) = qr(&weight)?;
                (Cpu.narrow(&q, 1, 0, rank)?, Cpu.narrow(&r, 0, 0, rank)?)
            }
        };
        Ok(Some(Start { down, up }))
    }

    /// The dense or sparse addition to `up·down` of very old LyCORIS files.
    fn old_addition(&self) -> Result<Option<Array>> {
        let size: usize = self.module.weight.iter().product();
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

    fn loha(&self, result: &mut Assembled) -> Result<AnyAdapter<Array>> {
        let [out, inner] = self.sizes();
        let channels = self.module.weight.get(1).copied().unwrap_or(1);
        let rank = self.rank(Role::Factor(Part::HadaW1B), &self.need(Role::Factor(Part::HadaW1B))?)?;
        let half = |a: Part, b: Part, core: Part| -> Result<(Array, Array, Option<Array>)> {
            let (a_role, b_role, core_role) = (Role::Factor(a), Role::Factor(b), Role::Factor(core));
            let (left, right) = (flat(&self.need(a_role)?)?, flat(&self.need(b_role)?)?);
            let core = self.take(core_role)?;
            match &core {
                None => {
                    if left.shape != [out, right.shape[0]] {
                        return Err(self.misfit(a_role, &left, Some((b_role, &right)), "it does not fit"));
                    }
                    if right.shape[1] != inner {
                        let problem = "its input is not the module's";
                        return Err(self.misfit(b_role, &right, Some((a_role, &left)), problem));
                    }
                }
                Some(core) => {
                    let kernel = inner / channels.max(1);
                    let fits = matches!(core.shape[..], [p, q, kh, kw]
                        if p == left.shape[0] && q == right.shape[0] && kh * kw == kernel);
                    if !fits || left.shape[1] != out || right.shape[1] != channels {
                        return Err(self.misfit(core_role, core, Some((b_role, &right)), "the core does not fit"));
                    }
                }
            }
            Ok((left, right, core))
        };
        let (w1_a, w1_b, t1) = half(Part::HadaW1A, Part::HadaW1B, Part::HadaT1)?;
        let (w2_a, w2_b, t2) = half(Part::HadaW2A, Part::HadaW2B, Part::HadaT2)?;
        let loha = Loha { w1_a, w1_b, w2_a, w2_b, t1, t2, scale: self.scale(rank, result)? };
        match self.magnitude(false)? {
            None => Ok(AnyAdapter::Loha(loha)),
            Some((magnitude, axis, rule)) => {
                Ok(AnyAdapter::Dora(Dora { direction: Direction::Loha(loha), magnitude, axis, rule }))
            }
        }
    }

    fn lokr(&self, result: &mut Assembled) -> Result<AnyAdapter<Array>> {
        let factor = |whole: Part, a: Part, b: Part, core: Part| -> Result<(KronFactor<Array>, [usize; 2])> {
            let [whole, a, b, core] = [whole, a, b, core].map(Role::Factor);
            if let Some(array) = self.take(whole)? {
                if self.has(a) || self.has(b) {
                    let other = if self.has(a) { a } else { b };
                    return Err(self.misfit(whole, &array, None, &format!("`{}` says it again", self.key(other))));
                }
                self.rank(whole, &array)?;
                let size = [array.shape[0], elements(&array) / array.shape[0].max(1)];
                return Ok((KronFactor::Whole(array), size));
            }
            if !self.has(a) && !self.has(b) {
                return Err(self.missing(whole));
            }
            let (left, right) = (flat(&self.need(a)?)?, flat(&self.need(b)?)?);
            self.rank(b, &right)?;
            if let Some(array) = self.take(core)? {
                let fits = matches!(array.shape[..], [p, q, _, _] if p == left.shape[0] && q == right.shape[0]);
                if !fits {
                    return Err(self.misfit(core, &array, Some((a, &left)), "the core does not fit"));
                }
                let size = [left.shape[1], right.shape[1] * array.shape[2] * array.shape[3]];
                return Ok((KronFactor::Tucker { core: array, a: left, b: right }, size));
            }
            if left.shape[1] != right.shape[0] {
                return Err(self.misfit(a, &left, Some((b, &right)), "the two halves have different ranks"));
            }
            let size = [left.shape[0], right.shape[1]];
            Ok((KronFactor::Product { a: left, b: right }, size))
        };
        // No program writes a core for the first factor; its role is never found in a file.
        let (w1, [o1, i1]) = factor(Part::KronW1, Part::KronW1A, Part::KronW1B, Part::KronT1)?;
        let (w2, [o2, i2]) = factor(Part::KronW2, Part::KronW2A, Part::KronW2B, Part::KronT2)?;
        let [out, inner] = self.sizes();
        if o1 * o2 != out || i1 * i2 != inner {
            let role = if self.has(Role::Factor(Part::KronW2)) { Part::KronW2 } else { Part::KronW2B };
            let role = Role::Factor(role);
            let problem = format!("the Kronecker product of the two factors is [{}, {}]", o1 * o2, i1 * i2);
            return Err(self.misfit(role, &self.need(role)?, None, &problem));
        }
        let product_rank = |factor: &KronFactor<Array>| match factor {
            KronFactor::Whole(_) => None,
            KronFactor::Product { b, .. } | KronFactor::Tucker { b, .. } => Some(b.shape[0]),
        };
        let scale =
            match (self.config.filter(|config| config.kind == PeftKind::Lokr), product_rank(&w2).or(product_rank(&w1)))
            {
                (Some(config), _) => config.scale(&self.names(), None) * self.scalar()?,
                (None, Some(rank)) => self.scale(rank, result)?,
                // Both factors whole: LyCORIS writes an alpha and does not mean it.
                (None, None) => {
                    self.alpha()?;
                    self.scalar()?
                }
            };
        let lokr = Lokr { w1, w2, scale };
        match self.magnitude(false)? {
            None => Ok(AnyAdapter::Lokr(lokr)),
            Some((magnitude, axis, rule)) => {
                Ok(AnyAdapter::Dora(Dora { direction: Direction::Lokr(lokr), magnitude, axis, rule }))
            }
        }
    }

    fn glora(&self, result: &mut Assembled) -> Result<AnyAdapter<Array>> {
        let [a1, a2, b1, b2] = [Part::GloraA1, Part::GloraA2, Part::GloraB1, Part::GloraB2];
        let read = |part| self.need(Role::Factor(part));
        let (whole_a1, whole_a2, whole_b1, whole_b2) = (read(a1)?, read(a2)?, read(b1)?, read(b2)?);
        let (fa1, fa2) = (flat(&whole_a1)?, flat(&whole_a2)?);
        let (fb1, fb2) = (flat(&whole_b1)?, flat(&whole_b2)?);
        let [out, inner] = self.sizes();
        let channels = self.module.weight.get(1).copied().unwrap_or(1);
        let fits = |tall_a: &Array, wide_a: &Array, tall_b: &Array, wide_b: &Array| {
            tall_a.shape == [channels, wide_a.shape[0]]
                && wide_a.shape[1] == channels
                && tall_b.shape == [out, wide_b.shape[0]]
                && wide_b.shape[1] == inner
        };
        // Where both fit, the older: as ComfyUI reads them.
        let order = if fits(&fa2, &fa1, &fb2, &fb1) {
            GloraOrder::Older
        } else if fits(&fa1, &fa2, &fb1, &fb2) {
            GloraOrder::Current
        } else {
            let (a1, b1) = (Role::Factor(a1), Role::Factor(b1));
            return Err(self.misfit(a1, &fa1, Some((b1, &fb1)), "the factors fit in neither order"));
        };
        let rank = if order == GloraOrder::Current { fa2.shape[0] } else { fa1.shape[0] };
        if rank == 0 {
            return Err(self.fault(Fault::RankZero { key: self.key(Role::Factor(a2)), shape: fa2.shape }));
        }
        self.refuse_magnitude("GLoRA")?;
        let scale = self.scale(rank, result)?;
        Ok(AnyAdapter::Glora(Glora { a1: whole_a1, a2: whole_a2, b1: whole_b1, b2: whole_b2, order, scale }))
    }

    fn full(&self) -> Result<AnyAdapter<Array>> {
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

    fn ia3(&self) -> Result<AnyAdapter<Array>> {
        let vector = self.need(Role::Weight)?;
        let on_input = self.number(Role::OnInput)?.unwrap_or(0.0);
        let axis = if on_input > 0.0 { Axis::Input } else { Axis::Output };
        self.check_length(Role::Weight, &vector, axis)?;
        Ok(AnyAdapter::Ia3(Ia3 { vector, axis, kind: Ia3Kind::Offset }))
    }

    fn peft_ia3(&self) -> Result<AnyAdapter<Array>> {
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

    fn oft(&self) -> Result<AnyAdapter<Array>> {
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
            [count, size, width] if size == width && count * size == out && size > 0 => {
                // sd-scripts always bounds, LyCORIS only by a positive number; the prefix tells them apart.
                let bound = bound.filter(|bound| self.spelling.starts_with("oft_unet_") || *bound > 0.0);
                Ok(AnyAdapter::Oft(Oft { blocks, rescale, side: OftSide::Rows { bound } }))
            }
            [stages, count, size, width] if size == width && count * size == out && size > 0 && stages > 0 => {
                Ok(AnyAdapter::Boft(Boft { blocks, rescale, bound: bound.filter(|bound| *bound > 0.0) }))
            }
            _ => Err(self.misfit(role, &blocks, None, "the blocks do not tile the module's output")),
        }
    }

    fn peft_oft(&self) -> Result<AnyAdapter<Array>> {
        let blocks = self.need(Role::PeftOft)?;
        let [_, inner] = self.sizes();
        let fits = match blocks.shape[..] {
            [count, packed] => {
                let size = usize::midpoint(1, (1 + 8 * packed).isqrt());
                size * (size - 1) / 2 == packed && (count * size == inner || count == 1 && inner % size == 0)
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

    // --- whole tensors

    fn replacements(&self, kind: Option<Kind>, result: &mut Assembled) -> Result<()> {
        let flat_spelling = ["lora_", "lycoris_", "oft_"].iter().any(|prefix| self.spelling.starts_with(prefix));
        let is_old_addition =
            kind == Some(Kind::LowRank) && matches!(result.adapters.first(), Some(AnyAdapter::Full(_)));
        for (role, tensor, under_adapters) in [
            (Role::BaseWeight, "weight", true),
            (Role::BaseBias, "bias", true),
            (Role::SetWeight, "weight", true),
            (Role::Weight, "weight", false),
            (Role::Bias, "bias", false),
        ] {
            let belongs_to_the_family =
                role == Role::Weight && kind == Some(Kind::Ia3) || role == Role::Bias && is_old_addition;
            let Some(key) = self.keys.get(&role).filter(|_| !belongs_to_the_family) else { continue };
            if flat_spelling && role == Role::Weight {
                return Err(self.missing(Role::OnInput));
            }
            let value = self.need(role)?;
            let name = format!("{}.{tensor}", self.path);
            let expected = match self.base.shape(self.component, &name) {
                Some(shape) => shape.to_vec(),
                None => vec![self.module.weight.first().copied().unwrap_or(0)],
            };
            // Tables may have grown by new tokens.
            let grown = matches!((&value.shape[..], &expected[..]), ([rows, width], [old, same])
                if rows > old && width == same && self.component == Component::LanguageModel);
            if value.shape != expected && !grown {
                return Err(self.misfit(role, &value, None, &format!("it replaces a tensor of shape {expected:?}")));
            }
            let (component, dtype) = (self.component, self.dtype(key));
            result.replacements.push(Replacement { component, tensor: name, value, rows: None, under_adapters, dtype });
        }
        if let Some(key) = self.keys.get(&Role::TokenRows) {
            let value = self.need(Role::TokenRows)?;
            let rows = self.config.and_then(|config| config.token_rows(self.path)).ok_or_else(|| {
                let problem = format!("it does not name the rows that `{key}` replaces");
                self.fault(Fault::PeftField { field: "trainable_token_indices".to_owned(), problem })
            })?;
            let [table, width] = self.sizes();
            if value.shape != [rows.len(), width] || rows.iter().any(|row| *row >= table) {
                let problem = format!("the configuration names {} rows of it", rows.len());
                return Err(self.misfit(Role::TokenRows, &value, None, &problem));
            }
            result.replacements.push(Replacement {
                component: self.component,
                tensor: format!("{}.weight", self.path),
                value,
                rows: Some(rows.to_vec()),
                under_adapters: false,
                dtype: self.dtype(key),
            });
        }
        Ok(())
    }

    // --- numbers

    /// What multiplies the product: `alpha / rank`, or what a configuration or an override says; 1 if nothing does.
    fn scale(&self, rank: usize, result: &mut Assembled) -> Result<f64> {
        let alpha = self.alpha()?;
        let scale = match (self.number(Role::Scale)?, alpha) {
            (Some(scale), _) => scale,
            (None, Some(alpha)) => alpha / rank as f64,
            (None, None) => self.config.map_or(1.0, |config| config.scale(&self.names(), Some(rank))),
        };
        if alpha == Some(0.0) {
            result.alpha_is_zero = Some(self.key(Role::Alpha));
        }
        Ok(scale * self.scalar()?)
    }

    fn scalar(&self) -> Result<f64> {
        Ok(self.number(Role::Scalar)?.unwrap_or(1.0))
    }

    fn alpha(&self) -> Result<Option<f64>> {
        self.number(Role::Alpha)
    }

    fn magnitude(&self, turned: bool) -> Result<Option<(Array, Axis, StrengthRule)>> {
        if let Some(magnitude) = self.take(Role::PeftMagnitude)? {
            let axis = if turned { Axis::Input } else { Axis::Output };
            self.check_length(Role::PeftMagnitude, &magnitude, axis)?;
            return Ok(Some((magnitude, axis, StrengthRule::KeepMagnitudes)));
        }
        let Some(magnitude) = self.take(Role::DoraScale)? else { return Ok(None) };
        let [out, inner] = [0, 1].map(|axis| self.module.weight.get(axis).copied().unwrap_or(1));
        let axis = match magnitude.shape[..] {
            [length] if (length == out) != (length == inner) => {
                if length == out {
                    Axis::Output
                } else {
                    Axis::Input
                }
            }
            [length, ref rest @ ..] if length == out && !rest.is_empty() && rest.iter().all(|length| *length == 1) => {
                Axis::Output
            }
            [1, length, ref rest @ ..] if length == inner && rest.iter().all(|length| *length == 1) => Axis::Input,
            _ => {
                let problem = "magnitudes run along the module's output or its input";
                return Err(self.misfit(Role::DoraScale, &magnitude, None, problem));
            }
        };
        Ok(Some((magnitude, axis, StrengthRule::Interpolate)))
    }

    fn refuse_magnitude(&self, family: &str) -> Result<()> {
        match self.keys.get(&Role::DoraScale).or_else(|| self.keys.get(&Role::PeftMagnitude)) {
            None => Ok(()),
            Some(key) => Err(self.fault(Fault::Unsupported {
                key: (*key).to_owned(),
                reason: format!("magnitudes over {family} have no known meaning"),
            })),
        }
    }

    fn check_length(&self, role: Role, vector: &Array, axis: Axis) -> Result<()> {
        let length = self.module.weight.get(if axis == Axis::Output { 0 } else { 1 });
        if length == Some(&elements(vector)) {
            return Ok(());
        }
        let problem = match axis {
            Axis::Output => "its length is not the module's output",
            Axis::Input => "its length is not the module's input",
        };
        Err(self.misfit(role, vector, None, problem))
    }

    // --- tensors

    fn has(&self, role: Role) -> bool {
        self.keys.contains_key(&role)
    }

    fn need(&self, role: Role) -> Result<Array> {
        self.take(role)?.ok_or_else(|| self.missing(role))
    }

    /// A tensor of finite floating-point numbers.
    fn take(&self, role: Role) -> Result<Option<Array>> {
        let Some(key) = self.keys.get(&role) else { return Ok(None) };
        let dtype = self.dtype(key);
        if !dtype.is_float() {
            return Err(self.fault(Fault::NotFloat { key: (*key).to_owned(), dtype }));
        }
        let array = self.file.array(key)?;
        if let Some(value) = array.values.iter().find(|value| !value.is_finite()) {
            return Err(self.fault(Fault::NotFinite { key: (*key).to_owned(), value: f64::from(*value) }));
        }
        if array.shape.is_empty() {
            return Err(self.misfit(role, &array, None, "a single number is no factor"));
        }
        Ok(Some(array))
    }

    /// A tensor of one finite number, of whatever type and shape.
    fn number(&self, role: Role) -> Result<Option<f64>> {
        let Some(key) = self.keys.get(&role) else { return Ok(None) };
        let numbers = self.file.doubles(key)?;
        let [number] = numbers[..] else {
            let shape = self.file.info(key).map(|info| info.shape.clone()).unwrap_or_default();
            return Err(self.fault(Fault::NotScalar { key: (*key).to_owned(), shape }));
        };
        if !number.is_finite() {
            return Err(self.fault(Fault::NotFinite { key: (*key).to_owned(), value: number }));
        }
        Ok(Some(number))
    }

    fn dtype(&self, key: &str) -> Dtype {
        self.file.info(key).map_or(Dtype::F32, |info| info.dtype)
    }

    fn rank(&self, role: Role, factor: &Array) -> Result<usize> {
        match factor.shape.first() {
            Some(rank) if elements(factor) > 0 => Ok(*rank),
            _ => Err(self.fault(Fault::RankZero { key: self.key(role), shape: factor.shape.clone() })),
        }
    }

    /// `[out, everything else]`.
    fn sizes(&self) -> [usize; 2] {
        match self.module.weight.split_first() {
            Some((out, rest)) => [*out, rest.iter().product()],
            None => [0, 0],
        }
    }

    /// The names under which a configuration may know the module.
    fn names(&self) -> Vec<&str> {
        std::iter::once(self.path).chain(self.path.strip_prefix("text_model.")).collect()
    }

    // --- faults

    fn fault(&self, fault: Fault) -> Error {
        Error::file(self.file.path(), fault)
    }

    fn key(&self, role: Role) -> String {
        self.keys.get(&role).copied().unwrap_or_default().to_owned()
    }

    /// The fault of a role that is not there, under the name that its key would have.
    fn missing(&self, role: Role) -> Error {
        let present = self.keys.values().next().copied().unwrap_or_default();
        let partners = self.keys.values().filter_map(|key| key::partner(key));
        let by_partner = partners.into_iter().find(|key| key::Key::parse(key).is_some_and(|key| key.role == role));
        let missing = by_partner.unwrap_or_else(|| format!("{}.{}", self.spelling, key::suffix_of(role)));
        self.fault(Fault::MissingPart { missing, present: present.to_owned() })
    }

    fn misfit(&self, role: Role, array: &Array, other: Option<(Role, &Array)>, problem: &str) -> Error {
        self.fault(Fault::Misfit(Box::new(Misfit {
            key: self.key(role),
            shape: array.shape.clone(),
            other: other.map(|(role, array)| (self.key(role), array.shape.clone())),
            module: self.path.to_owned(),
            base: self.module.weight.clone(),
            problem: problem.to_owned(),
        })))
    }
}

fn elements(array: &Array) -> usize {
    array.values.len()
}

/// `[first, rest]`.
fn flat(array: &Array) -> Result<Array> {
    let first = array.shape.first().copied().unwrap_or(1);
    Cpu.reshape(array, &[first, elements(array) / first.max(1)])
}

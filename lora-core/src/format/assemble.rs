//! The tensors of one module become adapters: which family they are, whether they fit, and what their scale is.
//!
//! Follows `docs/formats.md` §4 and §5. Nothing is left over: a tensor takes part in an adapter, replaces one of the
//! base, or is an error that names its key.

mod low_rank;
mod numbers;
mod others;
mod products;
mod whole;

use std::collections::BTreeMap;

pub use whole::Replacement;

use super::{BaseModel, Component, Fault, Module, ModuleKind, PeftConfig, Role, TensorFile, key};
use crate::{AnyAdapter, Array, Backend, Cpu, Part, Result};

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
}

fn elements(array: &Array) -> usize {
    array.values.len()
}

/// `[first, rest]`.
fn flat(array: &Array) -> Result<Array> {
    let first = array.shape.first().copied().unwrap_or(1);
    Cpu.reshape(array, &[first, elements(array) / first.max(1)])
}

//! Adapter files read without a base: the model that a file itself implies.
//!
//! Most families say how large a weight is by their own tensors. From those a base without numbers is built whose modules
//! are called exactly what the file calls them, whatever the dialect or the family of models, so that the one reader of
//! adapters ([`AdapterFile::of`]) serves here as well. What depends on the base's numbers (GLoRA, (IA)³, OFT, unconverted
//! PiSSA) is refused. Kernels of a convolution that a file stores folded (LoHa without cores) stay folded.

use std::{collections::BTreeMap, path::Path};

use super::{
    AdaptedModule, AdapterFile, BaseModel, Component, Family, Fault, Key, Role, TensorFile, adapter_file::adapter_path,
    guess, names::Place,
};
use crate::{Error, Part, Result, adapter::oft};

/// The shapes of a module's tensors.
pub(super) type Shapes<'a> = BTreeMap<Role, &'a [usize]>;

/// Bytes from which on an adapter is mapped, as a base is.
const LARGE: u64 = 256 << 20;

impl TensorFile {
    /// Opens the file of an adapter: the one that a folder of peft or diffusers holds, or the path itself. It is
    /// [`read`](Self::read), unless it is so large that this would take longer than what is done with it; then it is
    /// [mapped](Self::open).
    ///
    /// # Errors
    /// As [`read`](Self::read), and if a folder holds none.
    pub fn read_adapter(path: &Path) -> Result<Self> {
        let path = adapter_path(path)?;
        match std::fs::metadata(&path).is_ok_and(|found| found.len() >= LARGE) {
            true => Self::open(&path),
            false => Self::read(&path),
        }
    }
}

impl AdapterFile {
    /// Reads an adapter without a base: the path of a module is its name as the file has it, prefix and all.
    ///
    /// # Errors
    /// If the file is broken, or an adapter in it cannot be understood without the weight that it sits on.
    pub fn of_alone(file: &TensorFile) -> Result<Self> {
        let (mut read, modules) = Self::of_alone_each(file, &Ok)?;
        read.modules = modules;
        Ok(read)
    }

    /// [`of_each`](Self::of_each) without a base.
    ///
    /// # Errors
    /// As [`of_alone`](Self::of_alone), and what `each` returns.
    pub fn of_alone_each<T: Send>(
        file: &TensorFile,
        each: &(dyn Fn(AdaptedModule) -> Result<T> + Sync),
    ) -> Result<(Self, Vec<T>)> {
        let wants_base = |key: &&str| Key::parse(key).is_some_and(|key| needs_base(key.role));
        if let Some(key) = file.names().find(wants_base) {
            let reason = "what it does depends on the base weight";
            return Err(Error::file(file.path(), Fault::NeedsBase { key: key.to_owned(), reason }));
        }
        Self::of_each(file, &implied_base(file, &weight_of), each)
    }
}

/// The part of the model that the name of a module in a file points to, judged by its prefix.
pub(super) fn component_of(module: &str) -> Component {
    let bare = module.strip_prefix("base_model.model.");
    let starts = |names: &[&str]| names.iter().any(|name| bare.unwrap_or(module).starts_with(name));
    if starts(&["lora_te2_", "lora_te3_", "text_encoder_2.", "text_encoders.clip_g.", "text_encoders.t5xxl."]) {
        Component::TextEncoder2
    } else if starts(&["lora_te", "text_encoder", "text_model.", "encoder.layers."]) {
        Component::TextEncoder
    } else if starts(&[
        "lora_",
        "lycoris_",
        "oft_",
        "unet.",
        "diffusion_model.",
        "down_blocks.",
        "mid_block.",
        "up_blocks.",
    ]) || bare.is_none() && !starts(&["model.layers.", "lm_head", "model.embed_tokens"])
    {
        Component::Unet
    } else {
        Component::LanguageModel
    }
}

/// The family of models that a file seems to be for, as far as it decides how files are written.
pub(super) fn family(file: &TensorFile) -> Family {
    match guess::family(file) {
        Some("Stable Diffusion XL") => Family::Sdxl,
        Some("Stable Diffusion 2.x") => Family::Sd2,
        Some("a language model") => Family::Language("causal".to_owned()),
        _ => Family::Sd1,
    }
}

/// The base that a file implies, with stand-ins of some width for the weights that what multiplies them says nothing of.
pub(super) fn looked_at_base(file: &TensorFile) -> BaseModel {
    implied_base(file, &|shapes| weight_of(shapes).or_else(|| stand_in(shapes)))
}

fn implied_base(file: &TensorFile, weight_of: &dyn Fn(&Shapes<'_>) -> Option<Vec<usize>>) -> BaseModel {
    let mut modules: BTreeMap<&str, Shapes<'_>> = BTreeMap::new();
    for name in file.names() {
        if let (Some(key), Some(info)) = (Key::parse(name), file.info(name))
            && !name.starts_with("bundle_emb.")
        {
            modules.entry(key.module).or_default().insert(key.role, &info.shape);
        }
    }
    let mut tensors = Vec::new();
    let mut spellings: BTreeMap<String, Place> = BTreeMap::new();
    for (name, shapes) in modules {
        let Some(weight) = weight_of(&shapes) else { continue };
        let component = component_of(name);
        let rows = weight.first().copied().unwrap_or(0);
        tensors.push((component, format!("{name}.weight"), weight));
        if shapes.keys().any(|role| matches!(role, Role::Bias | Role::BaseBias | Role::Factor(Part::DiffBias))) {
            tensors.push((component, format!("{name}.bias"), vec![rows]));
        }
        spellings.insert(name.to_owned(), (component, name.to_owned()));
    }
    BaseModel::from_spellings(tensors, spellings, family(file))
}

/// The shape of the weight under the tensors of a module; `None` if they do not tell.
pub(super) fn weight_of(shapes: &Shapes<'_>) -> Option<Vec<usize>> {
    let get = |part: Part| shapes.get(&Role::Factor(part)).copied();
    let first = |part: Part| get(part)?.first().copied();
    let second = |part: Part| get(part)?.get(1).copied();
    let kernel = |part: Part| get(part)?.get(2..);
    let joined = |out: usize, inner: usize, kernel: &[usize]| [&[out, inner], kernel].concat();
    if let (Some(out), Some(down)) = (first(Part::Up), get(Part::Down)) {
        let kernel = kernel(Part::Mid).or(down.get(2..)).unwrap_or_default();
        return Some(joined(out, *down.get(1)?, kernel));
    }
    if let (Some([_, rows]), Some([width, _])) = (shapes.get(&Role::EmbeddingDown), shapes.get(&Role::EmbeddingUp)) {
        return Some(vec![*rows, *width]);
    }
    if get(Part::HadaW1A).is_some() {
        return match kernel(Part::HadaT1).or(kernel(Part::HadaT2)) {
            Some(kernel) => {
                let out = if get(Part::HadaT1).is_some() { second(Part::HadaW1A) } else { second(Part::HadaW2A) };
                let inner = if get(Part::HadaT1).is_some() { second(Part::HadaW1B) } else { second(Part::HadaW2B) };
                Some(joined(out?, inner?, kernel))
            }
            None => Some(vec![first(Part::HadaW1A)?, second(Part::HadaW1B)?]),
        };
    }
    if let Some(left) =
        get(Part::KronW1).map(<[usize]>::to_vec).or_else(|| Some(vec![first(Part::KronW1A)?, second(Part::KronW1B)?]))
    {
        let right = match (get(Part::KronW2), kernel(Part::KronT2)) {
            (Some(whole), _) => whole.to_vec(),
            (None, Some(kernel)) => joined(second(Part::KronW2A)?, second(Part::KronW2B)?, kernel),
            (None, None) => vec![first(Part::KronW2A)?, second(Part::KronW2B)?],
        };
        let product = |axis: usize| left.get(axis)?.checked_mul(*right.get(axis)?);
        return Some(joined(product(0)?, product(1)?, right.get(2..)?));
    }
    let whole = [Role::Factor(Part::Diff), Role::BaseWeight, Role::SetWeight];
    if let Some(shape) = whole.into_iter().find_map(|role| shapes.get(&role)) {
        return Some(shape.to_vec());
    }
    if let Some(shape) = shapes.get(&Role::Weight).filter(|_| !shapes.contains_key(&Role::OnInput)) {
        return Some(shape.to_vec());
    }
    get(Part::DiffBias).or(shapes.get(&Role::Bias).copied()).map(<[usize]>::to_vec)
}

/// A weight that what turns or stretches it fits on.
fn stand_in(shapes: &Shapes<'_>) -> Option<Vec<usize>> {
    const WIDTH: usize = 16;
    let length = |shape: &[usize]| shape.iter().try_fold(1_usize, |all, length| all.checked_mul(*length));
    if let Some(blocks) = shapes.get(&Role::Factor(Part::OftBlocks)) {
        // `[blocks, b, b]`, of butterflies after the stages.
        let [.., count, size, _] = **blocks else { return None };
        return Some(vec![count.checked_mul(size)?, WIDTH]);
    }
    if let Some([count, packed]) = shapes.get(&Role::PeftOft) {
        return Some(vec![WIDTH, count.checked_mul(oft::block_size(*packed)?)?]);
    }
    if let Some(factors) = shapes.get(&Role::PeftIa3) {
        return Some(if factors.first() == Some(&1) {
            vec![WIDTH, length(factors)?]
        } else {
            vec![length(factors)?, WIDTH]
        });
    }
    // Its axis is a number in the file: a square has both.
    let offsets = shapes.get(&Role::Weight).filter(|_| shapes.contains_key(&Role::OnInput))?;
    Some(vec![length(offsets)?; 2])
}

/// Whether a tensor belongs to a family whose update is a function of the base weight.
fn needs_base(role: Role) -> bool {
    match role {
        Role::Factor(part) => matches!(
            part,
            Part::GloraA1 | Part::GloraA2 | Part::GloraB1 | Part::GloraB2 | Part::OftBlocks | Part::Rescale
        ),
        Role::OnInput | Role::PeftIa3 | Role::PeftOft => true,
        _ => false,
    }
}

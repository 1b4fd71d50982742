//! A key of an adapter file, taken apart once: which module, which role.
//!
//! The suffix table is `docs/formats.md` §4; later code compares roles, never strings. What the module part means is the
//! business of `names`.

use crate::Part;

/// What a tensor of an adapter file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Role {
    /// A tensor of an adapter family.
    Factor(Part),
    /// Numerator of the scale; OFT: the constraint.
    Alpha,
    /// LyCORIS' magnitudes.
    DoraScale,
    /// peft's magnitudes.
    PeftMagnitude,
    /// peft's embedding factor over the vocabulary, `[rank, vocabulary]`.
    EmbeddingDown,
    /// peft's embedding factor over the width, `[width, rank]`.
    EmbeddingUp,
    /// LyCORIS: whether (IA)³ multiplies inputs.
    OnInput,
    /// A plain `weight`: (IA)³ of LyCORIS beside [`OnInput`](Self::OnInput), otherwise the whole weight (peft).
    Weight,
    /// A plain `bias`: the whole bias (peft), or a dense addition (very old LyCORIS).
    Bias,
    /// Very old LyCORIS: where a sparse addition has values.
    BiasIndices,
    /// Very old LyCORIS: those values.
    BiasValues,
    /// Very old LyCORIS: the size of the addition.
    BiasSize,
    /// peft's (IA)³ factors.
    PeftIa3,
    /// peft's packed OFT blocks.
    PeftOft,
    /// The whole weight under an adapter.
    BaseWeight,
    /// The whole bias under an adapter.
    BaseBias,
    /// Whole rows of an embedding.
    TokenRows,
    /// A Tucker core of GLoRA, declared by LyCORIS and never written.
    GloraCore,
    /// T-LoRA, which cannot be rebuilt from its file.
    TLora,
    /// The scale itself, in place of `alpha / rank`.
    Scale,
    /// A factor that good files have folded into another tensor.
    Scalar,
    /// ComfyUI: the whole weight.
    SetWeight,
    /// ComfyUI: the shape that the weight is padded to first.
    ReshapeWeight,
}

/// A key, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key<'a> {
    /// The part of the key that names the module, in whatever spelling.
    pub module: &'a str,
    /// The suffix as it is written, without the dot before it.
    pub suffix: &'a str,
    /// What the tensor is for.
    pub role: Role,
}

/// How suffixes are written; the longest that ends a key wins.
const SUFFIXES: &[(&str, Role)] = &[
    ("lora_down.weight", Role::Factor(Part::Down)),
    ("lora_up.weight", Role::Factor(Part::Up)),
    ("lora_mid.weight", Role::Factor(Part::Mid)),
    ("lora_A.weight", Role::Factor(Part::Down)),
    ("lora_B.weight", Role::Factor(Part::Up)),
    ("lora_A", Role::Factor(Part::Down)),
    ("lora_B", Role::Factor(Part::Up)),
    ("lora_B.bias", Role::Factor(Part::UpBias)),
    ("lora.down.weight", Role::Factor(Part::Down)),
    ("lora.up.weight", Role::Factor(Part::Up)),
    ("lora_linear_layer.down.weight", Role::Factor(Part::Down)),
    ("lora_linear_layer.up.weight", Role::Factor(Part::Up)),
    ("lora_linear_layer.up.bias", Role::Factor(Part::UpBias)),
    ("lora.up.bias", Role::Factor(Part::UpBias)),
    ("lora_embedding_A", Role::EmbeddingDown),
    ("lora_embedding_B", Role::EmbeddingUp),
    ("alpha", Role::Alpha),
    ("dora_scale", Role::DoraScale),
    ("lora_magnitude_vector", Role::PeftMagnitude),
    ("lora_magnitude_vector.weight", Role::PeftMagnitude),
    ("hada_w1_a", Role::Factor(Part::HadaW1A)),
    ("hada_w1_b", Role::Factor(Part::HadaW1B)),
    ("hada_w2_a", Role::Factor(Part::HadaW2A)),
    ("hada_w2_b", Role::Factor(Part::HadaW2B)),
    ("hada_t1", Role::Factor(Part::HadaT1)),
    ("hada_t2", Role::Factor(Part::HadaT2)),
    ("lokr_w1", Role::Factor(Part::KronW1)),
    ("lokr_w1_a", Role::Factor(Part::KronW1A)),
    ("lokr_w1_b", Role::Factor(Part::KronW1B)),
    ("lokr_w2", Role::Factor(Part::KronW2)),
    ("lokr_w2_a", Role::Factor(Part::KronW2A)),
    ("lokr_w2_b", Role::Factor(Part::KronW2B)),
    ("lokr_t2", Role::Factor(Part::KronT2)),
    ("a1.weight", Role::Factor(Part::GloraA1)),
    ("a2.weight", Role::Factor(Part::GloraA2)),
    ("b1.weight", Role::Factor(Part::GloraB1)),
    ("b2.weight", Role::Factor(Part::GloraB2)),
    ("bm.weight", Role::GloraCore),
    ("diff", Role::Factor(Part::Diff)),
    ("diff_b", Role::Factor(Part::DiffBias)),
    ("w_norm", Role::Factor(Part::Diff)),
    ("b_norm", Role::Factor(Part::DiffBias)),
    ("on_input", Role::OnInput),
    ("weight", Role::Weight),
    ("bias", Role::Bias),
    ("bias_indices", Role::BiasIndices),
    ("bias_values", Role::BiasValues),
    ("bias_size", Role::BiasSize),
    ("oft_blocks", Role::Factor(Part::OftBlocks)),
    ("rescale", Role::Factor(Part::Rescale)),
    ("oft_R.weight", Role::PeftOft),
    ("oft_R", Role::PeftOft),
    ("ia3_l", Role::PeftIa3),
    ("base_layer.weight", Role::BaseWeight),
    ("base_layer.bias", Role::BaseBias),
    ("token_adapter.trainable_tokens_delta", Role::TokenRows),
    ("q_layer.weight", Role::TLora),
    ("p_layer.weight", Role::TLora),
    ("lambda_layer", Role::TLora),
    ("scale", Role::Scale),
    ("scalar", Role::Scalar),
    ("set_weight", Role::SetWeight),
    ("reshape_weight", Role::ReshapeWeight),
];

/// Names between which peft may have left the name of an adapter.
const NAMED: &[(&str, &str, Role)] = &[
    ("lora_A", ".weight", Role::Factor(Part::Down)),
    ("lora_B", ".weight", Role::Factor(Part::Up)),
    ("lora_B", ".bias", Role::Factor(Part::UpBias)),
    ("lora_embedding_A", "", Role::EmbeddingDown),
    ("lora_embedding_B", "", Role::EmbeddingUp),
    ("lora_magnitude_vector", ".weight", Role::PeftMagnitude),
    ("lora_magnitude_vector", "", Role::PeftMagnitude),
    ("oft_R", ".weight", Role::PeftOft),
];

/// The partners inside a pair, in every spelling: what stands in place of the other in a missing key's name.
const PARTNERS: &[(&str, &str)] =
    &[("lora_down", "lora_up"), ("lora_A", "lora_B"), (".down.", ".up."), ("lora_embedding_A", "lora_embedding_B")];

impl<'a> Key<'a> {
    /// The parts of a key; `None` if it ends in no suffix that is known.
    pub fn parse(key: &'a str) -> Option<Self> {
        // `to_q_lora.down.weight`: the attention processors of old diffusers put the module's name into the suffix.
        for (suffix, part) in [("_lora.down.weight", Part::Down), ("_lora.up.weight", Part::Up)] {
            if let Some(module) = key.strip_suffix(suffix).filter(|module| !module.is_empty()) {
                return Some(Self { module, suffix: &suffix[1..], role: Role::Factor(part) });
            }
        }
        if let Some(named) = Self::parse_named(key) {
            return Some(named);
        }
        let ends = |suffix: &str| key.strip_suffix(suffix).and_then(|rest| rest.strip_suffix('.'));
        let (suffix, role) =
            SUFFIXES.iter().filter(|(suffix, _)| ends(suffix).is_some()).max_by_key(|(suffix, _)| suffix.len())?;
        let module = ends(suffix).filter(|module| !module.is_empty())?;
        Some(Self { module, suffix, role: *role })
    }

    /// `module.lora_A.default.weight` and the like.
    fn parse_named(key: &'a str) -> Option<Self> {
        NAMED.iter().find_map(|(start, end, role)| {
            let (rest, name) = key.strip_suffix(end)?.rsplit_once('.')?;
            let module = rest.strip_suffix(start)?.strip_suffix('.')?;
            // `lora_magnitude_vector.weight` is the plain spelling, not an adapter called `weight`.
            let is_name = !name.is_empty() && !["weight", "bias"].contains(&name);
            (is_name && !module.is_empty()).then(|| Self { module, suffix: &key[module.len() + 1..], role: *role })
        })
    }
}

/// The key that stands for the other half of a pair: of `lora_down` the `lora_up` in the same spelling, and the like.
pub(super) fn partner(key: &str) -> Option<String> {
    PARTNERS.iter().find_map(|(down, up)| match (key.rfind(down), key.rfind(up)) {
        (Some(at), None) => Some(format!("{}{up}{}", &key[..at], &key[at + down.len()..])),
        (None, Some(at)) => Some(format!("{}{down}{}", &key[..at], &key[at + up.len()..])),
        _ => None,
    })
}

/// How the suffix of a role is written by the program that brought it up.
pub(super) fn suffix_of(role: Role) -> &'static str {
    SUFFIXES.iter().find(|(_, other)| *other == role).map_or("weight", |(suffix, _)| suffix)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(key: &str) -> (&str, Role) {
        let key = Key::parse(key).unwrap();
        (key.module, key.role)
    }

    #[test]
    fn every_suffix_leads_to_its_role_and_the_longest_wins() {
        for (suffix, role) in SUFFIXES {
            assert_eq!(parsed(&format!("a.b_c.{suffix}")), ("a.b_c", *role), "{suffix}");
        }
        assert_eq!(parsed("m.lora_A.default.weight"), ("m", Role::Factor(Part::Down)));
        assert_eq!(parsed("m.lora_B.default.bias"), ("m", Role::Factor(Part::UpBias)));
        assert_eq!(parsed("m.lora_embedding_A.default"), ("m", Role::EmbeddingDown));
        assert_eq!(parsed("m.lora_magnitude_vector.default.weight"), ("m", Role::PeftMagnitude));
        assert_eq!(parsed("m.lora_magnitude_vector.weight"), ("m", Role::PeftMagnitude));
        assert_eq!(parsed("x.processor.to_out_lora.up.weight"), ("x.processor.to_out", Role::Factor(Part::Up)));
    }

    #[test]
    fn keys_without_a_module_or_a_suffix_have_no_parts() {
        for key in ["", "alpha", ".alpha", "a.mystery", "weight"] {
            assert_eq!(Key::parse(key), None, "{key}");
        }
    }

    #[test]
    fn the_other_half_is_named_in_the_same_spelling() {
        for (one, other) in [
            ("m.lora_down.weight", "m.lora_up.weight"),
            ("m.lora_B.default.weight", "m.lora_A.default.weight"),
            ("m.lora.down.weight", "m.lora.up.weight"),
            ("m.to_q_lora.up.weight", "m.to_q_lora.down.weight"),
            ("m.lora_embedding_A", "m.lora_embedding_B"),
        ] {
            assert_eq!(partner(one).as_deref(), Some(other));
        }
        assert_eq!(partner("m.hada_w1_a"), None);
    }
}

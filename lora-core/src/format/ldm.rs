//! Names of one module in two worlds: diffusers and transformers on one side, the original LDM and OpenCLIP on the other.
//!
//! Everything is a table that is read in both directions; what the tables cannot say (how many resnets a level has,
//! which levels have attention) is taken from the names of the model at hand. `docs/formats.md` §3 is the source; paths
//! here lack the prefixes of checkpoints (`model.diffusion_model.` and the like), and may end in `.weight`.

use std::collections::BTreeSet;

/// Pairs (diffusers, LDM) of path beginnings.
type Pairs = [(&'static str, &'static str)];

const UNET_ENDS: &Pairs = &[
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
];

const UNET_MID: &Pairs = &[("resnets.0", "0"), ("attentions.0", "1"), ("resnets.1", "2")];

const UNET_RESNET: &Pairs = &[
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
];

const VAE_ENDS: &Pairs = &[
    ("quant_conv", "quant_conv"),
    ("post_quant_conv", "post_quant_conv"),
    ("encoder.conv_in", "encoder.conv_in"),
    ("encoder.conv_norm_out", "encoder.norm_out"),
    ("encoder.conv_out", "encoder.conv_out"),
    ("decoder.conv_in", "decoder.conv_in"),
    ("decoder.conv_norm_out", "decoder.norm_out"),
    ("decoder.conv_out", "decoder.conv_out"),
];

const VAE_MID: &Pairs = &[("resnets.0", "block_1"), ("attentions.0", "attn_1"), ("resnets.1", "block_2")];

const VAE_RESNET: &Pairs = &[
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("conv_shortcut", "nin_shortcut"),
];

const VAE_ATTENTION: &Pairs =
    &[("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")];

const OPEN_CLIP_ENDS: &Pairs = &[
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_projection.weight", "text_projection"),
];

const OPEN_CLIP_LAYER: &Pairs = &[
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
];

/// The rows of OpenCLIP's fused projection, in order.
pub(super) const FUSED: [&str; 3] = ["q_proj", "k_proj", "v_proj"];

/// What the names of one UNet leave open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct UnetNames {
    /// Resnets of a level on the way down; on the way up it has one more.
    resnets: usize,
    /// Levels on the way up that have attention.
    up_attention: BTreeSet<usize>,
}

impl UnetNames {
    /// From the paths of a diffusers UNet.
    pub(super) fn of_diffusers<'a>(paths: impl Iterator<Item = &'a str>) -> Self {
        let (mut resnets, mut up_attention) = (1, BTreeSet::new());
        for path in paths {
            if let Some((_, rest)) = path.strip_prefix("down_blocks.").and_then(index) {
                if let Some((resnet, _)) = rest.strip_prefix("resnets.").and_then(index) {
                    resnets = resnets.max(resnet + 1);
                }
            } else if let Some((level, rest)) = path.strip_prefix("up_blocks.").and_then(index)
                && rest.starts_with("attentions.")
            {
                up_attention.insert(level);
            }
        }
        Self { resnets, up_attention }
    }

    /// Those of SDXL: attention on the first two levels on the way up.
    pub(super) fn sdxl() -> Self {
        Self { resnets: 2, up_attention: BTreeSet::from([0, 1]) }
    }

    /// Those of SD 1 and 2: attention on all levels on the way up but the first.
    pub(super) fn sd() -> Self {
        Self { resnets: 2, up_attention: BTreeSet::from([1, 2, 3]) }
    }

    /// From the paths of an LDM UNet.
    pub(super) fn of_ldm<'a>(paths: impl Iterator<Item = &'a str> + Clone) -> Self {
        let blocks = || paths.clone().filter_map(|path| path.strip_prefix("input_blocks.").and_then(index));
        let first_down = blocks().filter(|(_, rest)| after(rest, "0.op").is_some()).map(|(block, _)| block).min();
        let resnets = match first_down {
            Some(block) => block.saturating_sub(1),
            None => blocks().map(|(block, _)| block).max().unwrap_or(1),
        }
        .max(1);
        let up_attention = paths
            .clone()
            .filter_map(|path| path.strip_prefix("output_blocks.").and_then(index))
            .filter(|(_, rest)| rest.starts_with("1.") && after(rest, "1.conv").is_none())
            .map(|(block, _)| block / (resnets + 1))
            .collect();
        Self { resnets, up_attention }
    }

    /// The diffusers path of an LDM one.
    pub(super) fn diffusers_path(&self, path: &str) -> Option<String> {
        if let Some(path) = swap(UNET_ENDS, path, Way::FromLdm) {
            return Some(path);
        }
        if let Some(rest) = path.strip_prefix("middle_block.") {
            let path = swap(UNET_MID, rest, Way::FromLdm)?;
            return Some(format!("mid_block.{}", inside_unet_block(&path, Way::FromLdm)?));
        }
        let step = self.resnets + 1;
        if let Some((block, rest)) = path.strip_prefix("input_blocks.").and_then(index) {
            let (level, i) = ((block.checked_sub(1)?) / step, (block - 1) % step);
            if i == self.resnets {
                return Some(format!("down_blocks.{level}.downsamplers.0.conv{}", after(rest, "0.op")?));
            }
            let rest = self.inside_level(rest, i)?;
            return Some(format!("down_blocks.{level}.{rest}"));
        }
        let (block, rest) = path.strip_prefix("output_blocks.").and_then(index)?;
        let (level, i) = (block / step, block % step);
        if let Some(rest) = after(rest, "1.conv").or_else(|| after(rest, "2.conv")) {
            return (i == self.resnets).then(|| format!("up_blocks.{level}.upsamplers.0.conv{rest}"));
        }
        Some(format!("up_blocks.{level}.{}", self.inside_level(rest, i)?))
    }

    fn inside_level(&self, rest: &str, i: usize) -> Option<String> {
        match rest.split_once('.')? {
            ("0", rest) => Some(format!("resnets.{i}.{}", swap(UNET_RESNET, rest, Way::FromLdm)?)),
            ("1", rest) => Some(format!("attentions.{i}.{rest}")),
            _ => None,
        }
    }

    /// The LDM path of a diffusers one.
    pub(super) fn ldm_path(&self, path: &str) -> Option<String> {
        if let Some(path) = swap(UNET_ENDS, path, Way::ToLdm) {
            return Some(path);
        }
        if let Some(rest) = path.strip_prefix("mid_block.") {
            let rest = inside_unet_block(rest, Way::ToLdm)?;
            return Some(format!("middle_block.{}", swap(UNET_MID, &rest, Way::ToLdm)?));
        }
        let step = self.resnets + 1;
        if let Some((level, rest)) = path.strip_prefix("down_blocks.").and_then(index) {
            if let Some(rest) = after(rest, "downsamplers.0.conv") {
                return Some(format!("input_blocks.{}.0.op{rest}", step * level + step));
            }
            let (kind, rest) = rest.split_once('.')?;
            let (i, rest) = index(rest)?;
            return match kind {
                "resnets" => {
                    let rest = swap(UNET_RESNET, rest, Way::ToLdm)?;
                    Some(format!("input_blocks.{}.0.{rest}", step * level + i + 1))
                }
                "attentions" => Some(format!("input_blocks.{}.1.{rest}", step * level + i + 1)),
                _ => None,
            };
        }
        let (level, rest) = path.strip_prefix("up_blocks.").and_then(index)?;
        if let Some(rest) = after(rest, "upsamplers.0.conv") {
            let place = if self.up_attention.contains(&level) { 2 } else { 1 };
            return Some(format!("output_blocks.{}.{place}.conv{rest}", step * level + self.resnets));
        }
        let (kind, rest) = rest.split_once('.')?;
        let (i, rest) = index(rest)?;
        match kind {
            "resnets" => Some(format!("output_blocks.{}.0.{}", step * level + i, swap(UNET_RESNET, rest, Way::ToLdm)?)),
            "attentions" => Some(format!("output_blocks.{}.1.{rest}", step * level + i)),
            _ => None,
        }
    }
}

/// `resnets.N.x` with `x` swapped, `attentions.N.x` as it is.
fn inside_unet_block(path: &str, way: Way) -> Option<String> {
    match path.split_once('.')? {
        ("resnets", rest) => {
            let (i, rest) = index(rest)?;
            Some(format!("resnets.{i}.{}", swap(UNET_RESNET, rest, way)?))
        }
        ("attentions", _) => Some(path.to_owned()),
        _ => None,
    }
}

/// What the names of one VAE leave open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct VaeNames {
    /// Levels of the decoder, which LDM counts backwards.
    levels: usize,
}

impl VaeNames {
    /// From the paths of an LDM VAE.
    pub(super) fn of_ldm<'a>(paths: impl Iterator<Item = &'a str>) -> Self {
        Self::counted(paths.filter_map(|path| path.strip_prefix("decoder.up.")))
    }

    /// From the paths of a diffusers VAE.
    #[cfg(test)]
    pub(super) fn of_diffusers<'a>(paths: impl Iterator<Item = &'a str>) -> Self {
        Self::counted(paths.filter_map(|path| path.strip_prefix("decoder.up_blocks.")))
    }

    fn counted<'a>(levels: impl Iterator<Item = &'a str>) -> Self {
        Self { levels: levels.filter_map(|rest| Some(index(rest)?.0 + 1)).max().unwrap_or(0) }
    }

    /// The diffusers path of an LDM one.
    pub(super) fn diffusers_path(&self, path: &str) -> Option<String> {
        if let Some(path) = swap(VAE_ENDS, path, Way::FromLdm) {
            return Some(path);
        }
        let (half, rest) = path.split_once('.')?;
        if let Some(rest) = rest.strip_prefix("mid.") {
            let rest = inside_vae_block(&swap(VAE_MID, rest, Way::FromLdm)?, Way::FromLdm)?;
            return Some(format!("{half}.mid_block.{rest}"));
        }
        let (blocks, sampler, rest) = match half {
            "encoder" => ("down_blocks", "downsample", rest.strip_prefix("down.")?),
            "decoder" => ("up_blocks", "upsample", rest.strip_prefix("up.")?),
            _ => return None,
        };
        let (level, rest) = index(rest)?;
        let level = if half == "decoder" { self.levels.checked_sub(level + 1)? } else { level };
        if let Some(rest) = after(rest, &format!("{sampler}.conv")) {
            return Some(format!("{half}.{blocks}.{level}.{sampler}rs.0.conv{rest}"));
        }
        let (i, rest) = rest.strip_prefix("block.").and_then(index)?;
        Some(format!("{half}.{blocks}.{level}.resnets.{i}.{}", swap(VAE_RESNET, rest, Way::FromLdm)?))
    }

    /// The LDM path of a diffusers one.
    #[cfg(test)]
    pub(super) fn ldm_path(&self, path: &str) -> Option<String> {
        if let Some(path) = swap(VAE_ENDS, path, Way::ToLdm) {
            return Some(path);
        }
        let (half, rest) = path.split_once('.')?;
        if let Some(rest) = rest.strip_prefix("mid_block.") {
            return Some(format!("{half}.mid.{}", swap(VAE_MID, &inside_vae_block(rest, Way::ToLdm)?, Way::ToLdm)?));
        }
        let (blocks, sampler, rest) = match half {
            "encoder" => ("down", "downsample", rest.strip_prefix("down_blocks.")?),
            "decoder" => ("up", "upsample", rest.strip_prefix("up_blocks.")?),
            _ => return None,
        };
        let (level, rest) = index(rest)?;
        let level = if half == "decoder" { self.levels.checked_sub(level + 1)? } else { level };
        if let Some(rest) = after(rest, &format!("{sampler}rs.0.conv")) {
            return Some(format!("{half}.{blocks}.{level}.{sampler}.conv{rest}"));
        }
        let (i, rest) = rest.strip_prefix("resnets.").and_then(index)?;
        Some(format!("{half}.{blocks}.{level}.block.{i}.{}", swap(VAE_RESNET, rest, Way::ToLdm)?))
    }
}

fn inside_vae_block(path: &str, way: Way) -> Option<String> {
    let (kind, rest) = path.split_once('.')?;
    let (i, rest) = index(rest)?;
    let inside = if kind == "attentions" { VAE_ATTENTION } else { VAE_RESNET };
    Some(format!("{kind}.{i}.{}", swap(inside, rest, way)?))
}

/// What an OpenCLIP tensor becomes in transformers.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum OpenClip {
    /// One tensor.
    One(String),
    /// The projection, turned over.
    Turned(String),
    /// Three tensors, one per third of the rows.
    Fused([String; 3]),
}

/// The transformers path of an OpenCLIP tensor.
pub(super) fn from_open_clip(path: &str) -> Option<OpenClip> {
    if let Some(name) = swap(OPEN_CLIP_ENDS, path, Way::FromLdm) {
        return Some(if path == "text_projection" { OpenClip::Turned(name) } else { OpenClip::One(name) });
    }
    let (layer, rest) = path.strip_prefix("transformer.resblocks.").and_then(index)?;
    let inside = format!("text_model.encoder.layers.{layer}");
    if let Some(kind) = rest.strip_prefix("attn.in_proj_").filter(|kind| ["weight", "bias"].contains(kind)) {
        return Some(OpenClip::Fused(FUSED.map(|name| format!("{inside}.self_attn.{name}.{kind}"))));
    }
    Some(OpenClip::One(format!("{inside}.{}", swap(OPEN_CLIP_LAYER, rest, Way::FromLdm)?)))
}

/// The number of the layer that a transformers path of a text encoder lies in.
pub(super) fn clip_layer(path: &str) -> Option<usize> {
    path.strip_prefix("text_model.encoder.layers.").and_then(index).map(|(layer, _)| layer)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    ToLdm,
    FromLdm,
}

/// The path with its beginning exchanged for the partner in the table.
fn swap(pairs: &Pairs, path: &str, way: Way) -> Option<String> {
    pairs.iter().find_map(|(diffusers, ldm)| {
        let (from, to) = if way == Way::ToLdm { (diffusers, ldm) } else { (ldm, diffusers) };
        after(path, from).map(|rest| format!("{to}{rest}"))
    })
}

/// What follows a beginning that ends where a part of the path ends: nothing, or `.` and more.
fn after<'a>(path: &'a str, start: &str) -> Option<&'a str> {
    path.strip_prefix(start).filter(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// A number without leading zeros and what follows the `.` after it.
fn index(path: &str) -> Option<(usize, &str)> {
    let (number, rest) = path.split_once('.')?;
    let plain = number.bytes().all(|digit| digit.is_ascii_digit()) && (number == "0" || !number.starts_with('0'));
    // More levels than this would only make numbers overflow.
    let number = number.parse().ok().filter(|number| plain && *number < 100_000)?;
    Some((number, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beginnings_end_at_dots_and_numbers_are_plain() {
        assert_eq!(after("out.0.weight", "out.0"), Some(".weight"));
        assert_eq!(after("out.01", "out.0"), None);
        assert_eq!(index("3.x"), Some((3, "x")));
        assert_eq!(index("03.x"), None);
        assert_eq!(index("+3.x"), None);
        assert_eq!(index("99999999999999999999.x"), None);
    }

    /// The first two columns of a table of real names.
    fn table(name: &str) -> Vec<(String, String)> {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats/names");
        let text = std::fs::read_to_string(folder.join(name)).unwrap();
        let row = |line: &str| {
            line.split_once('\t').map(|(a, rest)| (a.to_owned(), rest.split('\t').next().unwrap().to_owned()))
        };
        text.lines().skip(2).map(|line| row(line).unwrap()).collect()
    }

    #[test]
    fn every_module_of_the_real_unets_translates_both_ways() {
        for (name, modules, known) in [
            ("sd15.unet.tsv", 391, UnetNames::sd()),
            ("sd21.unet.tsv", 391, UnetNames::sd()),
            ("sdxl.unet.tsv", 1050, UnetNames::sdxl()),
        ] {
            let rows = table(name);
            assert_eq!(rows.len(), modules, "{name}");
            let diffusers = UnetNames::of_diffusers(rows.iter().map(|(path, _)| &**path));
            let ldm = UnetNames::of_ldm(rows.iter().map(|(_, path)| &**path));
            assert_eq!((&diffusers, &ldm), (&known, &known), "{name}");
            for (path, ldm) in &rows {
                assert_eq!(known.ldm_path(path).as_ref(), Some(ldm));
                assert_eq!(known.diffusers_path(ldm).as_ref(), Some(path));
                let (weight, ldm_weight) = (format!("{path}.weight"), format!("{ldm}.weight"));
                assert_eq!(known.ldm_path(&weight).as_ref(), Some(&ldm_weight));
                assert_eq!(known.diffusers_path(&ldm_weight), Some(weight));
            }
        }
    }

    #[test]
    fn every_tensor_of_the_real_vae_translates_both_ways() {
        let rows = table("vae.tsv");
        let names = VaeNames::of_diffusers(rows.iter().map(|(path, _)| &**path));
        assert_eq!(names, VaeNames::of_ldm(rows.iter().map(|(_, path)| &**path)));
        assert_eq!(rows.len(), 248);
        for (path, ldm) in &rows {
            assert_eq!(names.ldm_path(path).as_ref(), Some(ldm));
            assert_eq!(names.diffusers_path(ldm).as_ref(), Some(path));
        }
    }

    #[test]
    fn what_is_no_module_translates_to_nothing() {
        for path in
            ["input_blocks.0.1.x", "input_blocks.3.1.norm", "middle_block.3.x", "output_blocks.0.1.conv", "out.1", ""]
        {
            assert_eq!(UnetNames::sd().diffusers_path(path), None, "{path}");
        }
        for path in ["down_blocks.0.samplers.0", "up_blocks.x.resnets.0.conv1", "mid_block.resnets.0.conv9", ""] {
            assert_eq!(UnetNames::sd().ldm_path(path), None, "{path}");
        }
        assert_eq!(VaeNames { levels: 4 }.diffusers_path("decoder.up.4.block.0.conv1"), None);
    }

    #[test]
    fn fused_rows_are_query_key_value() {
        let fused = from_open_clip("transformer.resblocks.7.attn.in_proj_bias");
        let expected = ["q", "k", "v"].map(|name| format!("text_model.encoder.layers.7.self_attn.{name}_proj.bias"));
        assert_eq!(fused, Some(OpenClip::Fused(expected)));
        assert_eq!(from_open_clip("logit_scale"), None);
    }
}

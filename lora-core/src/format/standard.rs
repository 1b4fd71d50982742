//! The published Stable Diffusions as names and shapes, without numbers: what an adapter can be read against where no base
//! is at hand.
//!
//! UNets follow `UNet2DConditionModel` of diffusers with the configurations of stable-diffusion-v1-5, stable-diffusion-2-1
//! and stable-diffusion-xl-base-1.0; text encoders follow CLIP-L, OpenCLIP H and OpenCLIP bigG in transformers' spelling.

use super::{BaseModel, Component, Family};

/// Rows of CLIP's vocabulary.
const WORDS: usize = 49_408;

/// Tokens of a prompt.
const TOKENS: usize = 77;

/// Width of what the time step becomes.
const TIME: usize = 1280;

type Tensors = Vec<(Component, String, Vec<usize>)>;

impl BaseModel {
    /// The UNet and text encoders of a family as published, without numbers; `None` for language models, which come in
    /// every size.
    pub fn standard(family: &Family) -> Option<Self> {
        let mut tensors = Tensors::new();
        let (unet, encoders): (_, &[_]) = match family {
            Family::Sd1 => (Unet::SD1, &[(Component::TextEncoder, Clip::L)]),
            Family::Sd2 => (Unet::SD2, &[(Component::TextEncoder, Clip::H)]),
            Family::Sdxl => (Unet::SDXL, &[(Component::TextEncoder, Clip::L), (Component::TextEncoder2, Clip::BIG_G)]),
            Family::Language(_) | Family::Transformers(_) => return None,
        };
        unet.write(&mut Names { component: Component::Unet, tensors: &mut tensors });
        for (component, clip) in encoders {
            clip.write(&mut Names { component: *component, tensors: &mut tensors });
        }
        Some(Self::from_shapes(tensors))
    }
}

/// Where tensors are listed.
struct Names<'a> {
    component: Component,
    tensors: &'a mut Tensors,
}

impl Names<'_> {
    fn put(&mut self, name: String, shape: &[usize]) {
        self.tensors.push((self.component, name, shape.to_vec()));
    }

    fn bare(&mut self, path: &str, shape: &[usize]) {
        self.put(format!("{path}.weight"), shape);
    }

    fn module(&mut self, path: &str, shape: &[usize]) {
        self.bare(path, shape);
        self.put(format!("{path}.bias"), &shape[..1]);
    }
}

struct Unet {
    /// Channels and transformer blocks of every level.
    levels: &'static [(usize, usize)],
    /// Transformer blocks in the middle.
    middle: usize,
    /// Width of the text.
    text: usize,
    /// Whether the projections around a transformer are matrices.
    linear: bool,
    /// Width of what SDXL is told of sizes and the pooled text.
    added: Option<usize>,
}

impl Unet {
    const SD1: Self =
        Self { levels: &[(320, 1), (640, 1), (1280, 1), (1280, 0)], middle: 1, text: 768, linear: false, added: None };
    const SD2: Self = Self { text: 1024, linear: true, ..Self::SD1 };
    const SDXL: Self =
        Self { levels: &[(320, 0), (640, 2), (1280, 10)], middle: 10, text: 2048, linear: true, added: Some(2816) };

    fn write(&self, names: &mut Names<'_>) {
        let first = self.levels[0].0;
        let last = self.levels[self.levels.len() - 1].0;
        names.module("conv_in", &[first, 4, 3, 3]);
        names.module("time_embedding.linear_1", &[TIME, first]);
        names.module("time_embedding.linear_2", &[TIME, TIME]);
        if let Some(added) = self.added {
            names.module("add_embedding.linear_1", &[TIME, added]);
            names.module("add_embedding.linear_2", &[TIME, TIME]);
        }
        // Channels of everything that the way up takes from the way down.
        let mut skips = vec![first];
        let mut channels = first;
        for (level, (width, depth)) in self.levels.iter().enumerate() {
            let block = format!("down_blocks.{level}");
            for layer in 0..2 {
                resnet(names, &format!("{block}.resnets.{layer}"), channels, *width);
                channels = *width;
                self.transformer(names, &format!("{block}.attentions.{layer}"), channels, *depth);
                skips.push(channels);
            }
            if level + 1 < self.levels.len() {
                names.module(&format!("{block}.downsamplers.0.conv"), &[channels, channels, 3, 3]);
                skips.push(channels);
            }
        }
        for layer in 0..2 {
            resnet(names, &format!("mid_block.resnets.{layer}"), last, last);
        }
        self.transformer(names, "mid_block.attentions.0", last, self.middle);
        for (level, (width, depth)) in self.levels.iter().rev().enumerate() {
            let block = format!("up_blocks.{level}");
            for layer in 0..3 {
                let skip = skips.pop().unwrap_or(first);
                resnet(names, &format!("{block}.resnets.{layer}"), channels + skip, *width);
                channels = *width;
                self.transformer(names, &format!("{block}.attentions.{layer}"), channels, *depth);
            }
            if level + 1 < self.levels.len() {
                names.module(&format!("{block}.upsamplers.0.conv"), &[channels, channels, 3, 3]);
            }
        }
        names.module("conv_norm_out", &[first]);
        names.module("conv_out", &[4, first, 3, 3]);
    }

    /// Attention to itself, attention to the text, and a gated feed-forward layer, `depth` times; nothing for 0.
    fn transformer(&self, names: &mut Names<'_>, path: &str, width: usize, depth: usize) {
        if depth == 0 {
            return;
        }
        let outer: &[usize] = if self.linear { &[width, width] } else { &[width, width, 1, 1] };
        names.module(&format!("{path}.norm"), &[width]);
        names.module(&format!("{path}.proj_in"), outer);
        for index in 0..depth {
            let block = format!("{path}.transformer_blocks.{index}");
            (1..=3).for_each(|norm| names.module(&format!("{block}.norm{norm}"), &[width]));
            for (attention, inner) in [("attn1", width), ("attn2", self.text)] {
                names.bare(&format!("{block}.{attention}.to_q"), &[width, width]);
                names.bare(&format!("{block}.{attention}.to_k"), &[width, inner]);
                names.bare(&format!("{block}.{attention}.to_v"), &[width, inner]);
                names.module(&format!("{block}.{attention}.to_out.0"), &[width, width]);
            }
            names.module(&format!("{block}.ff.net.0.proj"), &[8 * width, width]);
            names.module(&format!("{block}.ff.net.2"), &[width, 4 * width]);
        }
        names.module(&format!("{path}.proj_out"), outer);
    }
}

fn resnet(names: &mut Names<'_>, path: &str, from: usize, to: usize) {
    names.module(&format!("{path}.norm1"), &[from]);
    names.module(&format!("{path}.conv1"), &[to, from, 3, 3]);
    names.module(&format!("{path}.time_emb_proj"), &[to, TIME]);
    names.module(&format!("{path}.norm2"), &[to]);
    names.module(&format!("{path}.conv2"), &[to, to, 3, 3]);
    if from != to {
        names.module(&format!("{path}.conv_shortcut"), &[to, from, 1, 1]);
    }
}

#[derive(Clone, Copy)]
struct Clip {
    layers: usize,
    width: usize,
    projects: bool,
}

impl Clip {
    const L: Self = Self { layers: 12, width: 768, projects: false };
    /// diffusers keeps 23 of its 24 layers.
    const H: Self = Self { layers: 23, width: 1024, projects: false };
    const BIG_G: Self = Self { layers: 32, width: 1280, projects: true };

    fn write(&self, names: &mut Names<'_>) {
        let width = self.width;
        names.bare("text_model.embeddings.token_embedding", &[WORDS, width]);
        names.bare("text_model.embeddings.position_embedding", &[TOKENS, width]);
        for layer in 0..self.layers {
            let layer = format!("text_model.encoder.layers.{layer}");
            for projection in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                names.module(&format!("{layer}.self_attn.{projection}"), &[width, width]);
            }
            names.module(&format!("{layer}.layer_norm1"), &[width]);
            names.module(&format!("{layer}.mlp.fc1"), &[4 * width, width]);
            names.module(&format!("{layer}.mlp.fc2"), &[width, 4 * width]);
            names.module(&format!("{layer}.layer_norm2"), &[width]);
        }
        names.module("text_model.final_layer_norm", &[width]);
        if self.projects {
            names.bare("text_projection", &[width, width]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_module_has_the_shape_that_the_published_model_has() {
        let table = |name: &str| {
            let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats/names");
            std::fs::read_to_string(folder.join(format!("{name}.tsv"))).unwrap()
        };
        for (family, prefix, components) in [
            (Family::Sd1, "sd15", &["unet", "text_encoder"][..]),
            (Family::Sd2, "sd21", &["unet", "text_encoder"]),
            (Family::Sdxl, "sdxl", &["unet", "text_encoder", "text_encoder_2"]),
        ] {
            let base = BaseModel::standard(&family).unwrap();
            assert_eq!(*base.family(), family);
            for name in components {
                let component = Component::from_name(name).unwrap();
                let text = table(&format!("{prefix}.{name}"));
                let mut expected: Vec<(String, Vec<usize>, bool)> = text
                    .lines()
                    .skip(2)
                    .map(|line| {
                        let columns: Vec<&str> = line.split('\t').collect();
                        let shape = columns[3].split('x').map(|length| length.parse().unwrap()).collect();
                        (columns[0].to_owned(), shape, columns[4] == "bias")
                    })
                    .collect();
                expected.sort();
                let found = base.modules(component);
                let found: Vec<_> =
                    found.map(|(path, module)| (path.to_owned(), module.weight.clone(), module.bias)).collect();
                assert_eq!(found, expected, "{prefix}.{name}");
            }
        }
        assert!(BaseModel::standard(&Family::Language("llama".to_owned())).is_none());
    }
}

//! What the fuzz targets share: a small base, and containers made from a description.
//!
//! A target asks one question of any bytes; that nothing panics, overflows or takes more memory than the limits of the
//! fuzzer goes without saying.

use std::{collections::BTreeMap, path::Path};

use lora_core::{
    Array, Result,
    format::{AdapterFile, BaseModel, Component, Dtype, Strengths, TensorData, TensorFile, merge, tensors_to_bytes},
};

/// What the errors call the input.
pub fn path() -> &'static Path {
    Path::new("input.safetensors")
}

/// Modules of every kind in every component, with weights of a few numbers.
const MODULES: [(Component, &str, &[usize]); 12] = [
    (Component::Unet, "conv_in", &[4, 2, 3, 3]),
    (Component::Unet, "down_blocks.0.resnets.0.conv1", &[4, 4, 3, 3]),
    (Component::Unet, "down_blocks.0.attentions.0.proj_in", &[4, 4, 1, 1]),
    (Component::Unet, "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", &[4, 4]),
    (Component::Unet, "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0", &[4, 4]),
    (Component::Unet, "mid_block.attentions.0.transformer_blocks.0.norm1", &[4]),
    (Component::TextEncoder, "text_model.encoder.layers.0.self_attn.q_proj", &[4, 4]),
    (Component::TextEncoder, "text_model.encoder.layers.0.mlp.fc1", &[8, 4]),
    (Component::TextEncoder2, "text_projection", &[4, 4]),
    (Component::LanguageModel, "model.embed_tokens", &[6, 4]),
    (Component::LanguageModel, "model.layers.0.self_attn.q_proj", &[4, 4]),
    (Component::LanguageModel, "model.layers.0.mlp.down_proj", &[4, 6]),
];

/// A base of those modules, all with biases but the embedding.
pub fn base() -> BaseModel {
    BaseModel::from_shapes(MODULES.iter().flat_map(|(component, path, shape)| {
        let bias = (*path != "model.embed_tokens").then(|| (*component, format!("{path}.bias"), vec![shape[0]]));
        [(*component, format!("{path}.weight"), shape.to_vec())].into_iter().chain(bias)
    }))
}

/// The numbers of such a base: of no structure, and never 0.
pub fn weights(base: &BaseModel, component: Component, name: &str) -> Result<Option<Array>> {
    let Some(shape) = base.shape(component, name) else { return Ok(None) };
    let count = shape.iter().product::<usize>();
    let values = (0..count).map(|index| ((index * 7 + name.len()) % 11) as f32 / 4.0 - 1.3).collect();
    Array::new(shape, values).map(Some)
}

/// How the description of a tensor spells modules; `*` is where free text goes.
const SPELLINGS: [&str; 24] = [
    "lora_unet_conv_in",
    "lora_unet_down_blocks_0_resnets_0_conv1",
    "lora_unet_input_blocks_1_0_in_layers_2",
    "lora_unet_down_blocks_0_attentions_0_proj_in",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q",
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0",
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
    "oft_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_norm1",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    "text_encoder.encoder.layers.0.self_attn.q_proj",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "lora_te2_text_projection",
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
    "base_model.model.model.layers.0.mlp.down_proj",
    "lora_unet_double_blocks_0_img_attn_proj",
    "bundle_emb.word",
    "lora_unet_",
    "*",
];

/// How it spells roles.
const SUFFIXES: [&str; 62] = [
    "lora_down.weight",
    "lora_up.weight",
    "lora_mid.weight",
    "lora_A.weight",
    "lora_B.weight",
    "lora_A.default.weight",
    "lora_A",
    "lora_B",
    "lora_B.bias",
    "lora.down.weight",
    "lora.up.weight",
    "lora_linear_layer.down.weight",
    "lora_linear_layer.up.weight",
    "lora_embedding_A",
    "lora_embedding_B",
    "alpha",
    "dora_scale",
    "lora_magnitude_vector",
    "lora_magnitude_vector.weight",
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "hada_t1",
    "hada_t2",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "lokr_t2",
    "a1.weight",
    "a2.weight",
    "b1.weight",
    "b2.weight",
    "bm.weight",
    "diff",
    "diff_b",
    "w_norm",
    "b_norm",
    "on_input",
    "weight",
    "bias",
    "bias_indices",
    "bias_values",
    "bias_size",
    "oft_blocks",
    "rescale",
    "oft_R.weight",
    "ia3_l",
    "base_layer.weight",
    "base_layer.bias",
    "token_adapter.trainable_tokens_delta",
    "q_layer.weight",
    "lambda_layer",
    "scale",
    "scalar",
    "set_weight",
    "reshape_weight",
    "*",
    "",
];

/// Bytes that are eaten from the front; zeros when they are gone.
pub struct Bytes<'a>(pub &'a [u8]);

impl Bytes<'_> {
    /// The next byte.
    pub fn byte(&mut self) -> usize {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        usize::from(*first)
    }
}

/// A container whose tensors the input describes, seven bytes and a few numbers each; names that repeat are left out.
pub fn described(input: &[u8], metadata: &BTreeMap<String, String>) -> Option<TensorFile> {
    let mut input = Bytes(input);
    let mut tensors: BTreeMap<String, TensorData<'static>> = BTreeMap::new();
    while !input.0.is_empty() && tensors.len() < 24 {
        let (spelling, suffix) = (SPELLINGS[input.byte() % 24], SUFFIXES[input.byte() % 62]);
        let axes = input.byte();
        // Types that hold factors come more often than the rest.
        let dtype = match axes / 8 % 4 {
            0 | 1 => Dtype::F32,
            2 => [Dtype::F16, Dtype::Bf16, Dtype::F64, Dtype::I64][axes / 32 % 4],
            _ => Dtype::ALL[axes / 32 % Dtype::ALL.len()],
        };
        // Beside an axis of no length, others may be of any.
        let length = |byte: usize| match byte {
            255 => usize::MAX / 2,
            254 => 1 << 40,
            byte => byte % 10,
        };
        let shape: Vec<usize> = (0..axes % 8 % 6).map(|_| length(input.byte())).collect();
        let Some(length) = dtype.bytes_of(&shape).filter(|length| *length <= 1 << 14) else { continue };
        let (first, step) = (input.byte(), input.byte());
        let bytes = match dtype {
            // Numbers of a few values around 0; in other types whatever comes out.
            Dtype::F32 => (0..length / 4)
                .flat_map(|index| (((first + index * step) % 17) as f32 / 8.0 - 1.0).to_le_bytes())
                .collect(),
            _ => (0..length).map(|index| (first + index * step) as u8).collect::<Vec<u8>>(),
        };
        let mut free = String::new();
        if spelling == "*" || suffix == "*" {
            free = (0..input.byte() % 12).map(|_| char::from(input.byte() as u8)).collect();
        }
        let name = format!("{}.{}", spelling.replace('*', &free), suffix.replace('*', &free));
        tensors.insert(name, TensorData::new(dtype, shape, bytes).ok()?);
    }
    let tensors: Vec<_> = tensors.into_iter().collect();
    let bytes = tensors_to_bytes(path(), &tensors, metadata).ok()?;
    Some(TensorFile::from_bytes(path(), bytes).expect("what was written is legal"))
}

/// Reads an adapter and merges what was read: every key is accounted for, and shapes that passed fit.
pub fn read_and_merge(file: &TensorFile, base: &BaseModel) {
    let adapter = match AdapterFile::of(file, base) {
        Ok(adapter) => adapter,
        Err(error) => return drop(error.to_string()),
    };
    assert_eq!(adapter.applied() + adapter.unapplied.len() + adapter.embeddings.len(), adapter.keys);
    let strengths = Strengths::all(0.5);
    let merged = merge(&mut |component, name| weights(base, component, name), &[(&adapter, &strengths)]);
    match merged {
        Ok(changed) => {
            for ((component, name), array) in &changed {
                // A norm's bias or whole tensors may be new to the base; what is there keeps its size.
                let replaced = adapter.replacements.iter().any(|new| new.tensor == *name);
                if let Some(shape) = base.shape(*component, name).filter(|_| !replaced) {
                    assert_eq!(array.shape, shape, "{name}");
                }
            }
        }
        // Numbers may have no inverse.
        Err(error) => assert!(matches!(error, lora_core::Error::Numeric { .. }), "{error}"),
    }
}

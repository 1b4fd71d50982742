//! Writes a checkpoint of SDXL's true names and shapes (6.9 GB in fp16) and an adapter over all its linear layers, both
//! filled with made-up numbers: what the tools are timed on (`benches/tools/merge.sh`).
//!
//!     cargo run --release -p lora-core --example synthetic_checkpoint -- FOLDER [RANK]
//!
//! With `sd15` in the place of RANK a checkpoint of Stable Diffusion 1.5 alone (2.1 GB), for peers that have no room for SDXL.

use std::{collections::BTreeMap, io::Write, path::Path};

use lora_core::{
    Error, Result,
    format::{Dtype, TensorLayout, stream_tensors},
};

/// A line of the tables beside the tests: module, its name in a checkpoint, class, shape, bias.
struct Row<'a> {
    path: &'a str,
    ldm: &'a str,
    is_linear: bool,
    shape: Vec<usize>,
    has_bias: bool,
}

fn rows(table: &str) -> impl Iterator<Item = Row<'_>> {
    table.lines().skip(2).filter_map(|line| {
        let mut columns = line.split('\t');
        let (path, ldm, class, shape) = (columns.next()?, columns.next()?, columns.next()?, columns.next()?);
        let shape = shape.split('x').filter_map(|length| length.parse().ok()).collect();
        Some(Row { path, ldm, is_linear: class == "Linear", shape, has_bias: columns.next() == Some("bias") })
    })
}

macro_rules! table {
    ($name:literal) => {
        include_str!(concat!("../tests/fixtures/formats/names/", $name, ".tsv"))
    };
}

const UNET: &str = table!("sdxl.unet");
const FIRST: &str = table!("sdxl.text_encoder");
const SECOND: &str = table!("sdxl.text_encoder_2");
const SD15_UNET: &str = table!("sd15.unet");
const SD15_CLIP: &str = table!("sd15.text_encoder");
const VAE: &str = table!("vae");

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().unwrap_or_else(|| ".".to_owned());
    let folder = Path::new(&folder);
    let what = arguments.next().unwrap_or_else(|| "32".to_owned());
    if what == "sd15" {
        return write(&folder.join("sd15.safetensors"), &sd15(), 0x2800);
    }
    let rank = what.parse().map_err(|_| Error::Config { option: "rank", reason: format!("`{what}` is no number") })?;
    write(&folder.join("sdxl.safetensors"), &sdxl(), 0x2800)?;
    write(&folder.join("adapter.safetensors"), &adapter(rank), 0x1C00)
}

fn tensor(name: String, shape: &[usize]) -> TensorLayout {
    TensorLayout { name, dtype: Dtype::F16, shape: shape.to_vec() }
}

fn sdxl() -> Vec<TensorLayout> {
    let mut tensors = unet(UNET);
    rows(FIRST).for_each(|row| module(format!("conditioner.embedders.0.transformer.{}", row.path), &row, &mut tensors));
    rows(SECOND).for_each(|row| open_clip(&row, &mut tensors));
    tensors.extend(vae());
    tensors
}

fn sd15() -> Vec<TensorLayout> {
    let mut tensors = unet(SD15_UNET);
    rows(SD15_CLIP).for_each(|row| module(format!("cond_stage_model.transformer.{}", row.path), &row, &mut tensors));
    tensors.extend(vae());
    tensors
}

fn module(name: String, row: &Row<'_>, tensors: &mut Vec<TensorLayout>) {
    tensors.push(tensor(format!("{name}.weight"), &row.shape));
    if row.has_bias {
        tensors.push(tensor(format!("{name}.bias"), &row.shape[..1]));
    }
}

fn unet(table: &str) -> Vec<TensorLayout> {
    let mut tensors = Vec::new();
    rows(table).for_each(|row| module(format!("model.diffusion_model.{}", row.ldm), &row, &mut tensors));
    tensors
}

fn vae() -> impl Iterator<Item = TensorLayout> {
    VAE.lines().skip(2).filter_map(|line| {
        let [_, ldm, shape] = line.split('\t').collect::<Vec<_>>()[..] else { return None };
        let shape: Vec<usize> = shape.split('x').filter_map(|length| length.parse().ok()).collect();
        Some(tensor(format!("first_stage_model.{ldm}"), &shape))
    })
}

/// OpenCLIP's names: queries, keys and values in one tensor, the projection without a module.
fn open_clip(row: &Row<'_>, tensors: &mut Vec<TensorLayout>) {
    let mut put =
        |name: &str, shape: &[usize]| tensors.push(tensor(format!("conditioner.embedders.1.model.{name}"), shape));
    let path = row.path.strip_prefix("text_model.").unwrap_or(row.path);
    match path {
        "embeddings.token_embedding" => return put("token_embedding.weight", &row.shape),
        "embeddings.position_embedding" => return put("positional_embedding", &row.shape),
        "text_projection" => return put("text_projection", &row.shape),
        _ => {}
    }
    let Some(rest) = path.strip_prefix("encoder.layers.") else {
        put("ln_final.weight", &row.shape);
        return put("ln_final.bias", &row.shape);
    };
    let Some((layer, module)) = rest.split_once('.') else { return };
    let block = format!("transformer.resblocks.{layer}");
    let renamed = match module {
        "self_attn.q_proj" => {
            put(&format!("{block}.attn.in_proj_weight"), &[3 * row.shape[0], row.shape[1]]);
            return put(&format!("{block}.attn.in_proj_bias"), &[3 * row.shape[0]]);
        }
        "self_attn.k_proj" | "self_attn.v_proj" => return,
        "self_attn.out_proj" => "attn.out_proj",
        "mlp.fc1" => "mlp.c_fc",
        "mlp.fc2" => "mlp.c_proj",
        "layer_norm1" => "ln_1",
        _ => "ln_2",
    };
    put(&format!("{block}.{renamed}.weight"), &row.shape);
    put(&format!("{block}.{renamed}.bias"), &row.shape[..1]);
}

fn adapter(rank: usize) -> Vec<TensorLayout> {
    let unet = rows(UNET).map(|row| (format!("lora_unet_{}", row.ldm.replace('.', "_")), row));
    let first = rows(FIRST).map(|row| (format!("lora_te1_{}", row.path.replace('.', "_")), row));
    let second = rows(SECOND).map(|row| (format!("lora_te2_{}", row.path.replace('.', "_")), row));
    let linear = unet.chain(first).chain(second).filter(|(_, row)| row.is_linear && row.path != "text_projection");
    linear
        .flat_map(|(name, row)| {
            [
                tensor(format!("{name}.lora_down.weight"), &[rank, row.shape[1]]),
                tensor(format!("{name}.lora_up.weight"), &[row.shape[0], rank]),
                tensor(format!("{name}.alpha"), &[]),
            ]
        })
        .collect()
}

/// Writes numbers of either sign, of about the size that `exponent` says.
fn write(path: &Path, tensors: &[TensorLayout], exponent: u16) -> Result<()> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let numbers = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state as u16 & 0x83FF | exponent).to_le_bytes()
    });
    // A prime count of numbers, so that rows are not all equal.
    let pattern: Vec<u8> = numbers.take(1_048_573).flatten().collect();
    stream_tensors(path, tensors, &BTreeMap::new(), |index, out| {
        let mut left = Dtype::F16.bytes_of(&tensors[index].shape).unwrap_or(0);
        while left > 0 {
            let count = left.min(pattern.len());
            write_all(path, out, &pattern[..count])?;
            left -= count;
        }
        Ok(())
    })
}

fn write_all(path: &Path, out: &mut dyn Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes).map_err(|source| Error::Write { path: path.to_owned(), source })
}

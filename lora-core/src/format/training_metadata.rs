//! The metadata by which programs recognise a kohya file: `ss_*`, `modelspec.*` and the two hashes.
//!
//! Keys and values are those of sd-scripts (`train_network.py`, `library/sai_model_spec.py`, `library/train_util.py`); see
//! `docs/formats.md` §8. Values are strings, numbers and booleans as Python prints them.

use std::{collections::BTreeMap, fmt::Write as _, path::Path};

use serde_json::json;
use sha2::{Digest, Sha256};

use super::{Family, TensorData, TensorLayout, write};
use crate::Result;

/// What the metadata says about the adapters as a whole.
#[derive(Debug, Default)]
pub(super) struct Summary {
    pub network_module: &'static str,
    /// Rank and alpha of linear layers and 1×1 convolutions, as often as they differ.
    pub pairs: Vec<(usize, f64)>,
    /// The same of larger convolutions.
    pub kernels: Vec<(usize, f64)>,
}

/// What is written where nothing was said.
pub(super) fn defaults(family: &Family, summary: &Summary) -> Vec<(&'static str, String)> {
    let one = |pairs: &[(usize, f64)]| match pairs {
        [(rank, alpha)] => (rank.to_string(), python(*alpha)),
        _ => ("Dynamic".to_owned(), "Dynamic".to_owned()),
    };
    let (dim, alpha) = one(if summary.pairs.is_empty() { &summary.kernels } else { &summary.pairs });
    let mut arguments = serde_json::Map::new();
    if !summary.kernels.is_empty() {
        let (dim, alpha) = one(&summary.kernels);
        arguments.insert("conv_dim".to_owned(), json!(dim));
        arguments.insert("conv_alpha".to_owned(), json!(alpha));
    }
    let (base, v2, architecture, implementation, resolution) = match family {
        Family::Sd2 => ("sd_v2", "True", "stable-diffusion-v2-768-v/lora", "diffusers", "768x768"),
        Family::Sdxl => (
            "sdxl_base_v1-0",
            "False",
            "stable-diffusion-xl-v1-base/lora",
            "https://github.com/Stability-AI/generative-models",
            "1024x1024",
        ),
        _ => ("sd_v1", "False", "stable-diffusion-v1/lora", "diffusers", "512x512"),
    };
    vec![
        ("ss_network_module", summary.network_module.to_owned()),
        ("ss_network_dim", dim),
        ("ss_network_alpha", alpha),
        ("ss_network_args", serde_json::Value::Object(arguments).to_string()),
        ("ss_base_model_version", base.to_owned()),
        ("ss_v2", v2.to_owned()),
        ("modelspec.sai_model_spec", "1.0.0".to_owned()),
        ("modelspec.architecture", architecture.to_owned()),
        ("modelspec.implementation", implementation.to_owned()),
        ("modelspec.resolution", resolution.to_owned()),
    ]
}

/// Adds name and hashes: `ss_output_name`, `modelspec.title`, `sshs_model_hash`, `sshs_legacy_hash`.
///
/// The hashes are those of a copy that has the `ss_` metadata alone, so that editing the rest does not change them.
pub(super) fn add_hashes(
    path: &Path,
    tensors: &[(String, TensorData<'_>)],
    metadata: &mut BTreeMap<String, String>,
) -> Result<()> {
    let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let name = metadata.entry("ss_output_name".to_owned()).or_insert(name).clone();
    metadata.entry("modelspec.title".to_owned()).or_insert(name);
    let kept = metadata.iter().filter(|(key, _)| key.starts_with("ss_"));
    let kept: BTreeMap<String, String> = kept.map(|(key, value)| (key.clone(), value.clone())).collect();
    let layout: Vec<TensorLayout> = tensors
        .iter()
        .map(|(name, data)| TensorLayout { name: name.clone(), dtype: data.dtype(), shape: data.shape().to_vec() })
        .collect();
    let (header, order) = write::header(path, &layout, &kept)?;
    let mut whole = Sha256::new();
    let mut window = Window { hash: Sha256::new(), position: 0 };
    window.take(&header);
    for index in order {
        let bytes = tensors[index].1.bytes();
        whole.update(bytes);
        window.take(bytes);
    }
    metadata.insert("sshs_model_hash".to_owned(), hex(&whole.finalize()));
    metadata.insert("sshs_legacy_hash".to_owned(), hex(&window.hash.finalize()[..4]));
    Ok(())
}

/// Metadata without the hashes of numbers, which are none of a file in another spelling or type.
pub(super) fn without_hashes(metadata: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let hashes = ["sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"];
    let kept = metadata.iter().filter(|(key, _)| !hashes.contains(&key.as_str()));
    kept.map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// The hash of the 64 KiB at offset 1 MiB of what goes past: A1111's first way to tell models apart.
struct Window {
    hash: Sha256,
    position: usize,
}

impl Window {
    const START: usize = 0x10_0000;
    const END: usize = 0x11_0000;

    fn take(&mut self, bytes: &[u8]) {
        let inside = |at: usize| at.clamp(self.position, self.position + bytes.len()) - self.position;
        self.hash.update(&bytes[inside(Self::START)..inside(Self::END)]);
        self.position += bytes.len();
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing into a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A number as Python prints a float: `4.0`, `0.5`.
fn python(number: f64) -> String {
    format!("{number:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_sees_the_same_bytes_however_they_arrive() {
        let bytes: Vec<u8> = (0..0x12_0000_u32).map(|index| (index % 251) as u8).collect();
        let expected = Sha256::digest(&bytes[Window::START..Window::END]);
        for step in [1000, 70_000, 0x12_0000] {
            let mut window = Window { hash: Sha256::new(), position: 0 };
            bytes.chunks(step).for_each(|chunk| window.take(chunk));
            assert_eq!(window.hash.finalize(), expected);
        }
    }

    #[test]
    fn numbers_look_as_python_writes_them() {
        assert_eq!([python(4.0), python(0.5), python(-1.0)], ["4.0", "0.5", "-1.0"]);
    }
}

//! The adapter file that a run leaves: its layout, what it says about itself, and how to use it.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use lora_cli::{
    Failure,
    options::{TrainConfig, values::Format},
    text,
    usage::uses,
};
use lora_core::{
    AnyAdapter, Array, Backend as _, Part,
    format::{AdaptedModule, Component, Dialect, Dtype, Family, ModuleKind, write_adapter as write_file},
};
use lora_torch::{NamedAdapter, Torch};
use tch::Tensor;

use super::Known;
use crate::failures::Explain as _;

/// Where the adapter in a run's or a checkpoint's folder lies: a file, or with `--format peft` the folder itself.
pub(super) fn adapter_in(folder: &Path, config: &TrainConfig) -> PathBuf {
    match config.format {
        Format::Peft => folder.to_owned(),
        Format::Kohya | Format::Diffusers => folder.join(format!("{}.safetensors", config.name)),
    }
}

/// Writes the adapters, with what the field's programs look for.
///
/// # Errors
/// If a factor is not finite or does not fit half precision, or the file cannot be written.
pub(super) fn write_adapter(
    path: &Path,
    adapters: &[NamedAdapter],
    known: &Known,
    base: &Family,
    metadata: &BTreeMap<String, String>,
    dtype: Dtype,
) -> Result<(), Failure> {
    let modules: Vec<AdaptedModule> = adapters
        .iter()
        .map(|named| {
            let component = named.component.unwrap_or(Component::Unet);
            let module = known.names.module(component, &named.path);
            let weight = module.map(|module| module.weight.clone()).unwrap_or_default();
            Ok(AdaptedModule {
                component,
                path: named.path.clone(),
                adapter: on_host(&named.adapter)?,
                weight,
                dtype,
                turned: module.is_some_and(|module| module.kind == ModuleKind::Embedding), // as peft writes tables
            })
        })
        .collect::<Result<_, Failure>>()?;
    let dialect = match known.config.format {
        Format::Kohya => Dialect::Kohya,
        Format::Diffusers => Dialect::Diffusers,
        Format::Peft => Dialect::Peft,
    };
    write_file(path, dialect, base, &modules, metadata, Some(dtype)).explain()
}

/// The finished file, and what to type in the programs that people use.
pub(super) fn how_to_use(file: &Path, config: &TrainConfig, prompt: Option<&String>) -> String {
    let size = std::fs::metadata(file).ok().filter(std::fs::Metadata::is_file);
    let size = size.map_or_else(String::new, |facts| format!(" ({})", text::bytes(facts.len())));
    let base = Path::new(&config.base);
    let here = std::env::current_dir().ok();
    let base = here.and_then(|here| base.strip_prefix(here).ok()).unwrap_or(base).display().to_string();
    let prompt = prompt.map_or("a picture in the new style", String::as_str);
    let inside = if config.format == Format::Peft { file.join("adapter_model.safetensors") } else { file.to_owned() };
    let mut lines = vec![format!("File    {}{size}", file.display())];
    for (at, way) in uses(&inside, &base, prompt, config.format).into_iter().enumerate() {
        let label = if at == 0 { "Use it" } else { "" };
        lines.push(format!("{label:<8}{:<10} {}", way.program, way.how));
        lines.extend(way.code.iter().flat_map(|code| code.lines()).map(|line| format!("{:19}{line}", "")));
    }
    lines.join("\n")
}

/// The adapter with its tensors on the host.
fn on_host(adapter: &AnyAdapter<Tensor>) -> Result<AnyAdapter<Array>, Failure> {
    let to_array = |_: Part, tensor: &Tensor| {
        let values = Torch::CPU.values(tensor)?;
        Ok(Array { shape: tensor.size().iter().map(|length| *length as usize).collect(), values })
    };
    adapter.map(&mut |part, tensor| to_array(part, tensor)).explain()
}

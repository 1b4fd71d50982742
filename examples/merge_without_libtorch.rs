//! `lora-core` alone: an adapter file is read, every key accounted for, and merged into a model. No libtorch.
//!
//! `cargo run -p lora-examples --example merge_without_libtorch [ADAPTER.safetensors]` merges into the bundled tiny Stable
//! Diffusion; without a file it draws an adapter first, since it wants to download nothing.

#![expect(clippy::print_stdout, reason = "an example shows what came out")]

use std::{
    collections::BTreeMap,
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use lora_core::{
    AdapterConfig, AnyAdapter, Array, Backend, Cpu, Draw, Method, Purpose,
    adapter::Lora,
    format::{
        AdaptedModule, AdapterFile, BaseModel, Component, Dialect, Dtype, Strengths, TensorData, merge, write_adapter,
        write_tensors,
    },
    target::Targets,
};

fn main() -> Result<()> {
    let base = BaseModel::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/tiny-sd"))?;
    let folder = std::env::temp_dir().join("lora-merge-example");
    fs::create_dir_all(&folder)?;
    let path = match std::env::args_os().nth(1) {
        Some(path) => PathBuf::from(path),
        None => draw(&base, folder.join("drawn.safetensors"))?,
    };

    let adapter = AdapterFile::read(&path, &base)?;
    println!(
        "{}: {} of {} keys applied, {} modules",
        path.display(),
        adapter.applied(),
        adapter.keys,
        adapter.modules.len()
    );
    for (key, reason) in &adapter.unapplied {
        println!("  not applied: {} ({reason})", key.escape_debug());
    }

    let strength = Strengths::all(0.8);
    let changed = merge(&mut |component, name| base.read(component, name), &[(&adapter, &strength)])?;
    let (mut tensors, mut moved) = (Vec::new(), 0.0_f32);
    for (name, dtype, _) in base.tensors(Component::Unet) {
        let before = base.read(Component::Unet, name)?.context("the base lists it")?;
        let after = changed.get(&(Component::Unet, name.to_owned())).unwrap_or(&before);
        let (before, values) = (Cpu.values(&before)?, Cpu.values(after)?);
        moved = before.iter().zip(&values).map(|(before, after)| (before - after).abs()).fold(moved, f32::max);
        tensors.push((name.to_owned(), TensorData::from_f32(dtype, Cpu.shape(after), &values)?));
    }
    let merged = folder.join("unet.safetensors");
    write_tensors(&merged, &tensors, &BTreeMap::new())?;
    println!("{}: {} of {} tensors changed, by {moved:.4} at most", merged.display(), changed.len(), tensors.len());
    Ok(())
}

/// Writes a LoRA with random factors, as kohya's tools would, for the attentions of the UNet.
fn draw(base: &BaseModel, path: PathBuf) -> Result<PathBuf> {
    let rank = const { NonZeroUsize::new(4).expect("not 0") };
    let config = AdapterConfig::new(Method::Lora, rank, 2.0)?;
    let targets = Targets::parse(["attention"])?;
    let factor = |sample, rows: usize, columns: usize| -> Result<Array> {
        let values = Draw::new(42, Purpose::Init, 0, sample).normal(rows * columns, 0.1);
        Ok(Cpu.tensor(&values, &[rows, columns])?)
    };
    let mut modules = Vec::new();
    for (path, module) in
        base.modules(Component::Unet).filter(|(path, _)| targets.matches(Component::Unet, path, false))
    {
        let (&[out, inner], sample) =
            (module.weight.as_slice().first_chunk().context("a matrix")?, modules.len() as u32);
        modules.push(AdaptedModule {
            component: Component::Unet,
            path: path.to_owned(),
            adapter: AnyAdapter::Lora(Lora::new(
                factor(2 * sample, rank.get(), inner)?,
                factor(2 * sample + 1, out, rank.get())?,
                config.scale(),
            )),
            weight: module.weight.clone(),
            dtype: Dtype::F16,
            turned: false,
        });
    }
    write_adapter(&path, Dialect::Kohya, base.family(), &modules, &BTreeMap::new(), Some(Dtype::F16))?;
    Ok(path)
}

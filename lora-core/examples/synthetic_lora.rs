//! Writes a kohya LoRA over all linear layers of SDXL's UNet and text encoders, of made-up numbers whose singular values fall
//! off as those of trained files do: what `lora resize` is timed on (`benches/tools/ranks.sh`).
//!
//!     cargo run --release -p lora-core --example synthetic_lora -- FILE [RANK] [STEP] [sd15]
//!
//! With `STEP` only the first of every STEP modules, for peers that would take too long for all; with `sd15` for Stable
//! Diffusion 1.5.

use std::{collections::BTreeMap, path::Path};

use lora_core::{
    AnyAdapter, Array, Draw, Error, Lora, Purpose, Result,
    format::{AdaptedModule, BaseModel, Component, Dialect, Dtype, Family, ModuleKind, write_adapter},
};

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().unwrap_or_else(|| "lora.safetensors".to_owned());
    let rank: usize = arguments.next().and_then(|rank| rank.parse().ok()).unwrap_or(128);
    let step: usize = arguments.next().and_then(|step| step.parse().ok()).unwrap_or(1);
    let family = if arguments.next().is_some_and(|family| family == "sd15") { Family::Sd1 } else { Family::Sdxl };
    let base = BaseModel::standard(&family)
        .ok_or_else(|| Error::Config { option: "family", reason: format!("{family} is no published model") })?;
    // Drawing a quarter of a billion normal numbers would take longer than all that is measured.
    let pool = Draw::new(1, Purpose::Init, 0, 0).normal(1_048_573, 0.02);
    let mut at = 0;
    let mut numbers = |count: usize, falling: usize| -> Vec<f32> {
        let values = (0..count).map(|index| pool[(at + index) % pool.len()] / (1.0 + (index % falling) as f32).sqrt());
        let values = values.collect();
        at += count;
        values
    };
    let mut modules = Vec::new();
    for component in [Component::Unet, Component::TextEncoder, Component::TextEncoder2] {
        let linear = base.modules(component).filter(|(path, module)| {
            module.kind == ModuleKind::Linear && !path.contains("embedding") && *path != "text_projection"
        });
        for (path, module) in linear.step_by(step.max(1)) {
            let &[out, inner] = &module.weight[..] else { continue };
            let down = Array::new([rank, inner], numbers(rank * inner, 1))?;
            let up = Array::new([out, rank], numbers(out * rank, rank))?; // every column weaker than the one before
            modules.push(AdaptedModule {
                component,
                path: path.to_owned(),
                adapter: AnyAdapter::Lora(Lora::new(down, up, 0.5)),
                weight: module.weight.clone(),
                dtype: Dtype::F16,
                turned: false,
            });
        }
    }
    write_adapter(Path::new(&path), Dialect::Kohya, base.family(), &modules, &BTreeMap::new(), None)
}

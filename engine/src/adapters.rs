//! Adapter files on a loaded model.

use lora_cli::{Failure, options::values::LoraFile, text, ui::Ui};
use lora_core::{
    Array, Part,
    format::{AdapterFile, BaseModel, Component, Reason},
};
use lora_diffusion::{text::Text, unet::Unet};
use lora_torch::{Projection, Projections as _, Torch};
use tch::Tensor;

use crate::failures::Explain as _;

/// Puts all files on the model, each at its strength; a key that finds no place is an error that names it.
pub(crate) fn attach(
    files: &[LoraFile],
    names: &BaseModel,
    unet: &mut Unet,
    encoders: &mut Text,
    ui: &Ui,
) -> Result<(), Failure> {
    for file in files {
        let read = AdapterFile::read(&file.path, names).explain()?;
        refuse_unapplied(&read, file)?;
        for module in &read.modules {
            let strength = match module.component {
                Component::Unet => file.strength.unet,
                Component::TextEncoder2 => file.strength.text_encoder_2,
                _ => file.strength.text_encoder,
            };
            let mut places: Vec<&mut Projection> = match module.component {
                Component::Unet => unet.projections(),
                Component::TextEncoder => {
                    encoders.parts.first_mut().map(|part| part.encoder.projections()).unwrap_or_default()
                }
                Component::TextEncoder2 => {
                    encoders.parts.get_mut(1).map(|part| part.encoder.projections()).unwrap_or_default()
                }
                _ => Vec::new(),
            };
            let place = places.iter_mut().find(|projection| projection.path() == module.path);
            let Some(projection) = place else {
                return Err(Failure::new(
                    "cannot_attach",
                    format!(
                        "{}: `{}` of the {} cannot carry an adapter beside the base",
                        file.path.display(),
                        module.path,
                        module.component.name()
                    ),
                )
                .detail("adapters of norms and embeddings only work merged into the base"));
            };
            let on = projection.backend();
            projection.attach(on_device(&module.adapter, &on)?, strength);
        }
        ui.say(&format!(
            "Adapter {} on {}, strength {}",
            file.path.display(),
            text::plural(read.modules.len() as u64, "module"),
            file.strength
        ));
    }
    Ok(())
}

/// The same adapter with its tensors where the model is.
fn on_device(adapter: &lora_core::AnyAdapter<Array>, on: &Torch) -> Result<lora_core::AnyAdapter<Tensor>, Failure> {
    let moved = adapter.map(&mut |_: Part, array: &Array| lora_core::Backend::tensor(on, &array.values, &array.shape));
    moved.explain()
}

fn refuse_unapplied(read: &AdapterFile, file: &LoraFile) -> Result<(), Failure> {
    let Some((key, reason)) = read.unapplied.first() else { return Ok(()) };
    let why = match reason {
        Reason::NoModule(component) => format!("the base's {} has no such module", component.name()),
        Reason::NoComponent(component) => format!("the base has no {}", component.name()),
        Reason::OtherFamily(family) => format!("it belongs to {family}"),
        Reason::UnknownSuffix => "the end of its name is unknown".to_owned(),
        _ => "its name is unknown".to_owned(),
    };
    let count = read.unapplied.len();
    Err(Failure::new(
        "unapplied_keys",
        format!("{}: {count} of {} keys find no place in this base", file.path.display(), read.keys),
    )
    .detail(format!("the first is `{key}`: {why}"))
    .hint(format!("see all of them with `lora check {} --base BASE`", file.path.display()))
    .with("unapplied", count as u64))
}

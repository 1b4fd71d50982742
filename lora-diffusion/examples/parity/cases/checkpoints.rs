//! Single-file checkpoints: every tensor against its diffusers twin, and a pass through every component.

use std::collections::BTreeMap;

use lora_core::format::{Component, TensorFile, checkpoint::Checkpoint};
use lora_diffusion::{
    base::checkpoint_weights,
    clip::Clip,
    unet::{Added, Unet},
    vae::Vae,
};
use lora_parity::{Failure, Report};
use lora_torch::{Torch, Weights};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::fixture::Case;

const COMPONENTS: [Component; 4] = [Component::Unet, Component::Vae, Component::TextEncoder, Component::TextEncoder2];

pub(crate) fn run(case: &Case, report: &mut Report) -> Result<(), Failure> {
    let path = case.folder.join("checkpoint.safetensors");
    let components: Vec<Component> =
        COMPONENTS.into_iter().filter(|component| !case.config[component.name()].is_null()).collect();
    let weights: BTreeMap<Component, Weights> = components
        .iter()
        .map(|component| Ok((*component, checkpoint_weights(&path, *component)?)))
        .collect::<Result<_, Failure>>()?;

    let mut expected: Vec<String> =
        std::fs::read_to_string(case.folder.join("twin.tsv"))?.lines().skip(1).map(str::to_owned).collect();
    let mut got = Vec::new();
    for component in &components {
        // A second set of weights: reading the first here would hide what no layer reads below.
        got.extend(lines(*component, &checkpoint_weights(&path, *component)?)?);
    }
    expected.sort_unstable();
    got.sort_unstable();
    report.equal("tensors of the diffusers twin", &got, &expected);

    let unused: Vec<String> = serde_json::from_slice(&std::fs::read(case.folder.join("unused.json"))?)?;
    let map = Checkpoint::of(&TensorFile::open(&path)?)?.ok_or("not taken for a checkpoint")?;
    report.equal("keys without use", map.unused(), &unused);

    for component in components {
        pass(case, component, &weights[&component], report)?;
        report.equal(&format!("{component:?}: tensors that no layer reads"), &weights[&component].unused(), &[]);
    }
    Ok(())
}

/// A line of `twin.tsv` for every tensor of a component.
fn lines(component: Component, weights: &Weights) -> Result<Vec<String>, Failure> {
    let on = Torch::CPU.with_kind(Kind::Half);
    let names: Vec<String> = weights.names().map(str::to_owned).collect();
    let line = |name: &String| -> Result<String, Failure> {
        let shape = weights.shape(name).unwrap_or_default();
        let tensor = weights.root(&on).tensor(name, &shape)?.f_contiguous()?;
        let mut bytes = vec![0_u8; tensor.numel() * 2];
        tensor.f_view_dtype(Kind::Uint8)?.f_flatten(0, -1)?.f_copy_data(&mut bytes, tensor.numel() * 2)?;
        let shape = shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
        let print: String = Sha256::digest(&bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        Ok(format!("{}\t{name}\t{shape}\t{print}", component.name()))
    };
    names.iter().map(line).collect()
}

fn pass(case: &Case, component: Component, weights: &Weights, report: &mut Report) -> Result<(), Failure> {
    let scope = weights.root(&Torch::CPU);
    let latent = case.tensor("in.latent")?;
    let mut compare = |what: &str, got: &Tensor| {
        let name = format!("out.{what}");
        case.close(report, &name, got, &case.tensor(&name)?)
    };
    match component {
        Component::Unet => {
            let unet = Unet::new(&scope, &case.typed(component.name())?)?;
            let added = match case.has("in.pooled") {
                true => Some(Added { pooled: case.tensor("in.pooled")?, time_ids: case.tensor("in.time_ids")? }),
                false => None,
            };
            let t = Tensor::f_full([1], 500.0, (Kind::Float, Device::Cpu))?;
            compare("unet", &unet.forward(&latent, &t, &case.tensor("in.context")?, added.as_ref())?)
        }
        Component::Vae => {
            let vae = Vae::new(&scope, &case.typed(component.name())?)?;
            compare("vae_mean", &vae.encode(&case.tensor("in.image")?)?.mean)?;
            compare("vae_decoded", &vae.decode(&latent.f_narrow(2, 0, 4)?.f_narrow(3, 0, 6)?)?)
        }
        _ => {
            let name = component.name();
            let clip = Clip::new(&scope, &case.typed(name)?)?;
            let output = clip.forward(&case.tensor("in.ids")?)?;
            compare(&format!("{name}.last"), &output.last)?;
            compare(&format!("{name}.penultimate"), &output.penultimate)?;
            match output.projected {
                Some(projected) => compare(&format!("{name}.text_embeds"), &projected),
                None => Ok(()),
            }
        }
    }
}

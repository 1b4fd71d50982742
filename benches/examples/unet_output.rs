//! What our UNet makes of given inputs with an adapter file on it: our half of `peers/load_adapter.py`.
//!
//! `unet_output BASE ADAPTER INPUTS OUTPUT`: `INPUTS` holds `latents` `[b, c, h, w]`, `timesteps` `[b]` and `context`
//! `[b, t, d]`; `OUTPUT` gets `output` `[b, c, h, w]`. An adapter key that is not applied is an error.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::{Result, bail, ensure};
use lora_core::{
    Backend,
    format::{AdapterFile, Component, Dtype, Strengths, TensorData, write_tensors},
};
use lora_diffusion::{BaseFiles, adapters::attach};
use lora_torch::{Projections, Torch, Weights};

fn main() -> Result<()> {
    let paths: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [base, adapter, inputs, output] = paths.as_slice() else {
        bail!("usage: unet_output BASE ADAPTER INPUTS OUTPUT")
    };
    let files = BaseFiles::find(base)?;
    let adapter = AdapterFile::read(adapter, &files.model()?)?;
    ensure!(adapter.unapplied.is_empty(), "not applied: {:?}", adapter.unapplied);
    let mut unet = files.load_unet(&Torch::CPU)?;
    let unet_only = Strengths::all(0.0).with(Component::Unet, 1.0);
    attach(unet.projections(), &[(&adapter, &unet_only)])?;

    let inputs = Weights::open(std::slice::from_ref(inputs))?;
    let read = |name| -> Result<_> {
        let shape = inputs.shape(name).unwrap_or_default();
        Ok(inputs.root(&Torch::CPU).tensor(name, &shape)?)
    };
    let _no_grad = tch::no_grad_guard();
    let result = unet.forward(&read("latents")?, &read("timesteps")?, &read("context")?, None)?;
    let values = TensorData::from_f32(Dtype::F32, Torch::CPU.shape(&result), &Torch::CPU.values(&result)?)?;
    write_tensors(output, &[("output".to_owned(), values)], &BTreeMap::new())?;
    Ok(())
}

//! Which device and precision a command runs on.

use lora_cli::{
    Failure,
    options::values::{Device, Dtype},
    text,
};
use lora_torch::{Torch, cuda::Cuda};
use tch::Kind;

/// The device that was chosen, and what is known of it.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    /// Where frozen weights live, and in which kind.
    pub(crate) on: Torch,
    /// The door to CUDA where the device is one.
    pub(crate) cuda: Option<Cuda>,
}

impl Machine {
    /// Takes what was asked for; `auto` takes the first GPU where there is one.
    ///
    /// # Errors
    /// If a GPU was asked for and there is none that can be used.
    pub(crate) fn choose(device: Device, dtype: Dtype) -> Result<Self, Failure> {
        let cuda = match device {
            Device::Cpu => None,
            Device::Auto => Cuda::load(0).ok().map(|cuda| (0, cuda)),
            Device::Cuda(number) => Some((
                number,
                Cuda::load(number).map_err(|error| {
                    Failure::from_error("no_cuda", &error)
                        .hint("see what is missing with `lora doctor`, or train on the processor with `--device cpu`")
                })?,
            )),
        };
        let kind = match (dtype, &cuda) {
            (Dtype::Bf16, _) | (Dtype::Auto, Some(_)) => Kind::BFloat16,
            (Dtype::Fp16, _) => Kind::Half,
            (Dtype::Fp32, _) | (Dtype::Auto, None) => Kind::Float,
        };
        let device = cuda.as_ref().map_or(tch::Device::Cpu, |(number, _)| tch::Device::Cuda(*number));
        if let Some((_, cuda)) = &cuda {
            cuda.enter_side_stream().map_err(|error| Failure::from_error("cuda", &error))?;
        }
        Ok(Self { on: Torch { device, kind }, cuda: cuda.map(|(_, cuda)| cuda) })
    }

    /// The same device in fp32: for the VAE, whose activations overflow in half precision.
    pub(crate) fn full_precision(&self) -> Torch {
        Torch { device: self.on.device, kind: Kind::Float }
    }

    /// How many threads with a model each a batch is shared out over; 0 is one model and all threads inside each operation.
    pub(crate) fn lanes(&self, batch: usize) -> usize {
        let threads = usize::try_from(tch::get_num_threads()).unwrap_or(1);
        match (self.on.device, batch.min(threads)) {
            (tch::Device::Cpu, lanes @ 2..) => lanes,
            _ => 0,
        }
    }

    /// `cpu, fp32` or `NVIDIA H100 80GB HBM3, bf16`.
    pub(crate) fn describe(&self) -> String {
        let kind = match self.on.kind {
            Kind::BFloat16 => "bf16",
            Kind::Half => "fp16",
            _ => "fp32",
        };
        let name = self.cuda.as_ref().and_then(|cuda| cuda.facts().ok()).map(|facts| facts.name);
        match name {
            Some(name) => format!("{name}, {kind}"),
            None => format!("cpu ({}), {kind}", text::plural(tch::get_num_threads().max(1) as u64, "thread")),
        }
    }

    /// Bytes that are free on the device, if it says so.
    pub(crate) fn free_memory(&self) -> Option<u64> {
        match &self.cuda {
            Some(cuda) => cuda.memory().ok().map(|memory| memory.free),
            None => {
                let facts = std::fs::read_to_string("/proc/meminfo").ok()?;
                let line = facts.lines().find(|line| line.starts_with("MemAvailable:"))?;
                line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
            }
        }
    }
}

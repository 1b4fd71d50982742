"""Does an adapter file of ours mean the same to diffusers?

Loads it with `load_lora_weights`, checks that every tensor of the file arrived (none left over, each equal to what the
loaded model holds), runs diffusers' UNet with it, and compares the output with ours for the same inputs.

    python3 load_adapter.py ADAPTER.safetensors --base BASE --unet-output target/release/examples/unet_output

Ends with 1 if anything differs. The program named by --unet-output comes from this folder's parent
(`cargo build --release -p lora-benches --examples`).
"""

import argparse
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

# The outputs differ by the order of sums in float32 through some hundred layers; values are of order 1. Seen: 1.4e-6.
TOLERANCE = 2e-5


class Complaints(logging.Handler):
    """Keeps what diffusers and peft warn of: that is how they report keys that they do not use."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--unet-output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=7)
    return parser.parse_args()


def fingerprints(tensors):
    """The tensors without their names, in an order that does not depend on names."""
    return sorted((tuple(tensor.shape), tensor.double().sum().item(), tensor.double().abs().sum().item()) for tensor in tensors)


def unet_alone(pipe, inputs):
    with torch.no_grad():
        return pipe.unet(inputs["latents"], inputs["timesteps"], inputs["context"]).sample


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(2)
    pipe = StableDiffusionPipeline.from_pretrained(args.base, torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.unet.config
    inputs = {
        "latents": torch.randn(2, config.in_channels, config.sample_size, config.sample_size),
        "timesteps": torch.tensor([3, 801]),
        "context": torch.randn(2, 77, config.cross_attention_dim),
    }
    plain = unet_alone(pipe, inputs)

    complaints = Complaints()
    for library in ("diffusers", "peft"):
        logging.getLogger(library).addHandler(complaints)
    pipe.load_lora_weights(str(args.adapter.parent), weight_name=args.adapter.name, adapter_name="ours")
    adapted = unet_alone(pipe, inputs)

    in_file = {key: tensor for key, tensor in load_file(args.adapter).items() if not key.endswith("alpha")}
    # A file for the UNet alone makes diffusers mention that the text encoder gets nothing, which is as it should be.
    expected = () if any(key.startswith(("lora_te", "text_encoder")) for key in in_file) else ("No LoRA keys associated to CLIP",)
    faults = [f"diffusers says: {message}" for message in complaints.messages if not message.startswith(expected)]
    in_model = {
        name: parameter.detach()
        for component in (pipe.unet, pipe.text_encoder)
        for name, parameter in component.named_parameters()
        if "lora_" in name
    }
    if len(in_file) != len(in_model):
        faults.append(f"the file has {len(in_file)} factors, the loaded model {len(in_model)}")
    elif fingerprints(in_file.values()) != fingerprints(in_model.values()):
        faults.append("a factor in the loaded model is not the file's")

    with tempfile.TemporaryDirectory() as folder:
        given, got = Path(folder) / "inputs.safetensors", Path(folder) / "output.safetensors"
        save_file(inputs, given)
        with_libtorch = Path(__file__).resolve().parents[2] / ".cargo/with-libtorch"
        subprocess.run([with_libtorch, args.unet_output, args.base, args.adapter, given, got], check=True)
        ours = load_file(got)["output"]
    difference = (ours - adapted).abs().max().item()
    change = (adapted - plain).abs().max().item()
    if difference > TOLERANCE:
        faults.append(f"our UNet differs from diffusers' by {difference:.2e}, allowed is {TOLERANCE:.0e}")
    if change < 1000 * TOLERANCE:
        faults.append(f"the adapter changes the output by {change:.2e} only: the comparison says nothing")

    print(f"{len(in_file)} factors in the file, {len(in_model)} in diffusers' model")
    print(f"largest difference of the UNet outputs {difference:.2e}; the adapter changes them by {change:.2e}")
    for fault in faults:
        print(f"FAULT {fault}")
    sys.exit(1 if faults else 0)


main()

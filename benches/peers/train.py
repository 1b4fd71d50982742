"""The demo's training, written with diffusers and peft: the peer of `lora train`.

Same job: a folder of captioned pictures, the base's VAE and text encoder run once over all of them, then AdamW on LoRA
factors in every attention projection, noise prediction, gradient clipping. It is what a careful user of the two
libraries writes: latents and text embeddings are cached, nothing is evaluated, saved or logged in between.

    python3 train.py DATA --base BASE --steps 60 --batch 4 --rank 8 --threads 2

Writes one JSON line: seconds of every step, the clock at the end of the first, and the number of trained parameters.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def pixels(path: Path) -> torch.Tensor:
    """A picture as [3, h, w] in -1..1."""
    picture = Image.open(path).convert("RGB")
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return values.view(picture.height, picture.width, 3).permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def prepare(data: Path, base: Path):
    """Latent distributions [n, 8, h, w] and text embeddings [n, 77, d] of all pictures."""
    files = sorted(data.glob("*.png"))
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae", torch_dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder", torch_dtype=torch.float32)
    posterior = vae.encode(torch.stack([pixels(file) for file in files])).latent_dist
    captions = [file.with_suffix(".txt").read_text().strip() for file in files]
    ids = tokenizer(captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    return posterior.mean, posterior.std, vae.config.scaling_factor, text_encoder(ids)[0]


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    mean, std, scaling, context = prepare(args.data, args.base)
    scheduler = DDPMScheduler.from_pretrained(args.base, subfolder="scheduler")
    unet = UNet2DConditionModel.from_pretrained(args.base, subfolder="unet", torch_dtype=torch.float32)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01)

    order, seconds, first_step_at, losses = torch.empty(0, dtype=torch.long), [], None, []
    for _ in range(args.steps):
        started = time.perf_counter()
        if len(order) < args.batch:
            order = torch.randperm(len(mean))
        rows, order = order[: args.batch], order[args.batch :]
        latents = (mean[rows] + std[rows] * torch.randn_like(mean[rows])) * scaling
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(rows),))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicted = unet(noisy, timesteps, context[rows]).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
        first_step_at = first_step_at or time.time()
    trained = sum(parameter.numel() for parameter in parameters)
    print(json.dumps({"seconds": seconds, "first_step_at": first_step_at, "trained_parameters": trained, "loss": losses}))


main()

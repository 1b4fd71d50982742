"""Our language model beside transformers + peft: the same training and the same generation, in the same run.

Starts `lora train` and `lora generate` and the peer in turns, a few times each, and prints the ratios of step time, time for
a generated token, and time from process start to the first token. Both train LoRA factors of rank 8 in every attention
projection of the bundled tiny model, in float32, with the same number of threads, on the same rows in batches of 16.

    python3 text.py [--rounds 3] [--steps 60] [--threads 2] [--data FILE.jsonl] [--json FILE]
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "assets/tiny-llm"
BATCH, RANK, TOKENS, WARM_UP = 16, 8, 200, 10
PROMPT = "Once upon a time"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, default=ROOT / "assets/texts/pirate_train.jsonl")
    parser.add_argument("--lora", type=Path, default=ROOT / "target/release/lora")
    parser.add_argument("--json", type=Path, help="write all measured numbers here")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def peer(args):
    """Within a process of its own: trains, generates, and prints what it measured."""
    began = float(os.environ["BEGAN"])
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt")
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(**ids, **greedy, max_new_tokens=1)
    first = time.time() - began
    model.generate(**ids, **greedy, max_new_tokens=8)
    started = time.perf_counter()
    model.generate(**ids, **greedy, max_new_tokens=TOKENS)
    token = (time.perf_counter() - started) / TOKENS

    rows = [json.loads(line) for line in args.data.read_text().splitlines()]
    texts = [row["messages"] if "messages" in row else None for row in rows]
    examples = []
    for row, messages in zip(rows, texts):
        if messages:
            whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
            asked = tokenizer.apply_chat_template(messages[:-1], tokenize=True, add_generation_prompt=True, return_dict=False)
        else:
            asked = tokenizer(row["prompt"])["input_ids"]
            whole = asked + tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        examples.append((whole, len(asked)))
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    seconds = []
    for step in range(args.steps):
        batch = [examples[(step * BATCH + at) % len(examples)] for at in range(BATCH)]
        length = max(len(whole) for whole, _ in batch)
        inputs = torch.zeros(BATCH, length, dtype=torch.long)
        labels = torch.full((BATCH, length), -100)
        mask = torch.zeros(BATCH, length, dtype=torch.long)
        for at, (whole, asked) in enumerate(batch):
            inputs[at, : len(whole)] = torch.tensor(whole)
            labels[at, asked : len(whole)] = torch.tensor(whole[asked:])
            mask[at, : len(whole)] = 1
        started = time.perf_counter()
        loss = model(input_ids=inputs, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"step_ms": 1e3 * statistics.median(seconds[WARM_UP:]), "token_ms": 1e3 * token, "first_s": first}))


def theirs(args, environment):
    command = [sys.executable, __file__, "--peer", "--steps", args.steps, "--threads", args.threads, "--data", args.data]
    environment = {**environment, "BEGAN": str(time.time())}
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def ours(args, environment, folder):
    def run(*words):
        began = time.time()
        done = subprocess.run([str(word) for word in (args.lora, *words)], env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        return time.time() - began, done.stderr

    common = ["--base", BASE, "--device", "cpu", "--dtype", "fp32"]
    out = folder / "run"
    run("train", args.data, *common, "--out", out, "--targets", "attention", "--rank", RANK, "--batch", BATCH, "--steps",
        args.steps, "--lr", 2e-3, "--sample-every", 0, "--save-every", 0, "--no-progress")
    clock = [json.loads(line)["seconds"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [after - before for before, after in zip(clock, clock[1:])]
    ask = ["generate", PROMPT, *common, "--raw", "--temperature", 0, "--max-tokens"]
    first, _ = run(*ask, 1)
    spoken = [re.search(r"(\d+) tokens in ([\d.]+) s", run(*ask, TOKENS)[1]) for _ in range(2)]
    token = min(float(said[2]) / int(said[1]) for said in spoken)
    return {"step_ms": 1e3 * statistics.median(steps[WARM_UP:]), "token_ms": 1e3 * token, "first_s": first}


def main():
    args = arguments()
    if args.peer:
        return peer(args)
    results = {"ours": [], "peer": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "XDG_CACHE_HOME": folder}
            results["ours"].append(ours(args, environment, Path(folder)))
            results["peer"].append(theirs(args, environment))
    print(f"{args.data.name}, batch {BATCH}, rank {RANK}, {args.threads} threads; best of {args.rounds} runs each")
    print(f"{'':28}{'lora':>10}{'transformers + peft':>21}{'ratio':>8}")
    names = {"step_ms": "step (median), ms", "token_ms": "a generated token, ms", "first_s": "start to first token, s"}
    for key, name in names.items():
        best = {side: min(run[key] for run in runs) for side, runs in results.items()}
        print(f"{name:28}{best['ours']:10.2f}{best['peer']:21.2f}{best['peer'] / best['ours']:8.2f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


main()

"""Our training beside the peer's: the same job on the same machine in the same run.

Starts `lora train` and `train.py` in turns, a few times each, and prints the ratio of step time, of the time from process
start to the end of the first step, and of resident memory. Both train LoRA factors of one rank in every attention projection
of the bundled tiny Stable Diffusion, in float32, with the same number of threads, from the same pictures; both compute
latents and text embeddings anew in every run.

    python3 compare.py [--rounds 3] [--steps 100] [--batch 4] [--rank 8] [--threads 2] [--json FILE]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA, BASE = ROOT / "assets/styles/neon", ROOT / "assets/tiny-sd"
# The first steps warm caches and allocators up, on both sides.
WARM_UP = 10


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lora", type=Path, default=ROOT / "target/release/lora")
    parser.add_argument("--json", type=Path, help="write all measured numbers here")
    return parser.parse_args()


def started(command, environment, watch=None):
    """Runs to the end; gives stdout, the clock at the start, the clock when `watch` had a line, and the peak memory."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        began, seen, ended = time.time(), None, 0
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=errors)
        while not ended:
            time.sleep(0.005)
            # The usage includes programs that this one started and waited for, as `lora` does with `lora-engine`.
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if watch and seen is None and watch.exists() and b"\n" in watch.read_bytes():
                seen = time.time()
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        if process.returncode != 0:
            sys.exit(f"{' '.join(command)} failed:\n{errors.read().decode(errors='replace')}")
        out.seek(0)
        return out.read().decode(), began, seen, usage.ru_maxrss * 1024


def peer(args, environment):
    command = [sys.executable, Path(__file__).with_name("train.py"), DATA, "--base", BASE]
    command += ["--steps", args.steps, "--batch", args.batch, "--rank", args.rank, "--threads", args.threads]
    out, began, _, memory = started([str(word) for word in command], environment)
    told = json.loads(out.splitlines()[-1])
    return summary(told["seconds"], told["first_step_at"] - began, memory)


def ours(args, environment, folder):
    run = folder / "run"
    command = [args.lora, "train", DATA, "--base", BASE, "--out", run, "--device", "cpu", "--dtype", "fp32"]
    command += ["--targets", "attention", "--rank", args.rank, "--batch", args.batch, "--steps", args.steps]
    command += ["--lr", 2e-3, "--schedule", "constant", "--warmup", 0, "--caption-dropout", 0, "--flip=false"]
    command += ["--min-snr", 0, "--sample-every", 0, "--save-every", 0, "--log-every", 1]
    metrics = run / "metrics.jsonl"
    _, began, seen, memory = started([str(word) for word in command], environment, watch=metrics)
    clock = [json.loads(line)["seconds"] for line in metrics.read_text().splitlines()]  # since the run's start, after each step
    return summary([after - before for before, after in zip(clock, clock[1:])], seen - began, memory)


def summary(seconds, first, memory):
    return {"step_ms": 1e3 * statistics.median(seconds[WARM_UP:]), "first_step_s": first, "memory_mib": memory / 2**20}


def main():
    args = arguments()
    results = {"ours": [], "peer": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            # A cache of its own per run: nothing is left over from the run before.
            environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "XDG_CACHE_HOME": folder}
            results["ours"].append(ours(args, environment, Path(folder)))
            results["peer"].append(peer(args, environment))
    print(f"batch {args.batch}, rank {args.rank}, {args.threads} threads; best of {args.rounds} runs each")
    print(f"{'':26}{'lora':>10}{'diffusers + peft':>18}{'ratio':>8}")
    names = {"step_ms": "step (median), ms", "first_step_s": "start to first step, s", "memory_mib": "resident memory, MiB"}
    for key, name in names.items():
        best = {side: min(run[key] for run in runs) for side, runs in results.items()}
        print(f"{name:26}{best['ours']:10.2f}{best['peer']:18.2f}{best['peer'] / best['ours']:8.2f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


main()

#!/usr/bin/env bash
# How do the tools compare with those of sd-scripts on the same files and the same machine?
#
#     SD_SCRIPTS=CHECKOUT PYTHON=python benches/tools/peers.sh [FOLDER] [PARTS]
#
# Needs a checkout of kohya-ss/sd-scripts with what its requirements.txt names, GNU time, and in FOLDER room for 8 GB, for "merge"
# 24 GB and as much memory; files that merge.sh or ranks.sh left there are used again. PARTS (all): those of
# "resize", "merge", "extract", "decompose" and "inspect" that are wanted. sd-scripts decomposes every ΔW whole, which on a CPU
# takes many minutes a file, so resizing and extraction are timed on every 16th module. sd_scripts.py beside this file runs its
# scripts where transformers 5 is installed.
set -euo pipefail

folder=${1:-$(mktemp -d)}
parts=${2:-resize merge extract decompose inspect}
here=$(dirname "$0")
lora=${LORA:-target/release/lora}
python=${PYTHON:-python3}
export PYTHONPATH=$SD_SCRIPTS
mkdir -p "$folder"
example() { cargo run --quiet --release -p lora-core --example "$@"; }

measured() { # what, command...
    local what=$1
    shift
    /usr/bin/time -f "$what: %e s, %M KiB resident, user %U s, system %S s" "$@" > "$folder/output.txt" 2> "$folder/errors.txt" ||
        { cat "$folder/errors.txt"; exit 1; }
    tail -n 1 "$folder/errors.txt"
}

wanted() { case " $parts " in *" $1 "*) true ;; *) false ;; esac; }

if wanted resize; then
    [ -f "$folder/some.safetensors" ] || example synthetic_lora -- "$folder/some.safetensors" 128 16
    measured "lora resize, every 16th module" "$lora" resize "$folder/some.safetensors" "$folder/r32.safetensors" --rank 32
    measured "resize_lora.py, every 16th module" "$python" "$SD_SCRIPTS/networks/resize_lora.py" --new_rank 32 \
        --save_precision fp16 --model "$folder/some.safetensors" --save_to "$folder/r32.safetensors"
fi
sdxl() { [ -f "$folder/sdxl.safetensors" ] || example synthetic_checkpoint -- "$folder" 32; }

if wanted merge; then
    sdxl
    measured "lora merge" "$lora" merge -q --base "$folder/sdxl.safetensors" --lora "$folder/adapter.safetensors:0.8" \
        --out "$folder/merged.safetensors"
    rm -f "$folder/merged.safetensors"
    measured "sdxl_merge_lora.py" "$python" "$here/sd_scripts.py" "$SD_SCRIPTS" networks/sdxl_merge_lora.py \
        --sd_model "$folder/sdxl.safetensors" --models "$folder/adapter.safetensors" --ratios 0.8 \
        --precision "${PRECISION:-float}" --save_precision fp16 --no_metadata --save_to "$folder/merged.safetensors"
    rm -f "$folder/merged.safetensors"
fi
if wanted extract; then
    # Stable Diffusion 1.5: of SDXL, extract_lora_from_models.py wants more than 23 GB of memory.
    [ -f "$folder/sd15.safetensors" ] || example synthetic_checkpoint -- "$folder" sd15
    [ -f "$folder/some15.safetensors" ] || example synthetic_lora -- "$folder/some15.safetensors" 128 16 sd15
    "$lora" merge -q --base "$folder/sd15.safetensors" --lora "$folder/some15.safetensors" --out "$folder/tuned.safetensors"
    for ((round = 1; round <= 3; round++)); do
        measured "lora extract, every 16th module" "$lora" extract -q --base "$folder/sd15.safetensors" \
            --tuned "$folder/tuned.safetensors" --rank 32 --dtype fp16 --out "$folder/r32.safetensors"
    done
    measured "extract_lora_from_models.py, every 16th module" "$python" "$here/sd_scripts.py" "$SD_SCRIPTS" \
        networks/extract_lora_from_models.py --model_org "$folder/sd15.safetensors" \
        --model_tuned "$folder/tuned.safetensors" --dim 32 --save_precision fp16 --no_metadata \
        --save_to "$folder/peer.safetensors"
    "$lora" diff "$folder/r32.safetensors" "$folder/peer.safetensors" || true
    rm -f "$folder/tuned.safetensors" "$folder/peer.safetensors"
fi
if wanted decompose; then
    "$python" - << 'PY'
import time, torch
for shape in (640, 640), (1280, 1280), (1280, 5120):
    matrix = torch.randn(shape)
    start = time.time()
    torch.linalg.svd(matrix)
    print(f"torch.linalg.svd as extract_lora_from_models.py calls it, {shape[0]}x{shape[1]}: {time.time() - start:.2f} s")
PY
fi
if wanted inspect; then
    [ -f "$folder/adapter.safetensors" ] || example synthetic_checkpoint -- "$folder" 32
    measured "lora inspect" "$lora" inspect "$folder/adapter.safetensors"
    measured "check_lora_weights.py" "$python" "$SD_SCRIPTS/networks/check_lora_weights.py" "$folder/adapter.safetensors"
fi
rm -f "$folder/r32.safetensors" "$folder/output.txt" "$folder/errors.txt"

#!/usr/bin/env bash
# How long do the tools on ranks take at SDXL's size, and what do they lose?
#
#     benches/tools/ranks.sh [FOLDER] [ROUNDS]
#
# Writes a rank-128 LoRA over all linear layers of SDXL and its text encoders into FOLDER (0.9 GB, needs 1.5 GB), unless it
# is there already, and times `lora resize` to rank 32, ROUNDS times (3). Then the randomised decomposition of `lora extract`
# against the whole one, on single matrices of SDXL's shapes. Needs GNU time; close other programs.
set -euo pipefail

folder=${1:-$(mktemp -d)}
rounds=${2:-3}
lora=${LORA:-target/release/lora}
mkdir -p "$folder"
[ -f "$folder/r128.safetensors" ] ||
    cargo run --quiet --release -p lora-core --example synthetic_lora -- "$folder/r128.safetensors" 128

echo "load before: $(cut -d ' ' -f 1 /proc/loadavg) on $(nproc) cores"
for ((round = 1; round <= rounds; round++)); do
    /usr/bin/time -f "resize 128 to 32: %e s, %M KiB resident, user %U s, system %S s" \
        "$lora" resize "$folder/r128.safetensors" "$folder/r32.safetensors" --rank 32 > /dev/null
done
rm -f "$folder/r32.safetensors"
cargo run --quiet --release -p lora-core --example decompositions

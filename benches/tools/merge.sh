#!/usr/bin/env bash
# Is merging into a checkpoint of SDXL's size bound by the disk, and does it leave the memory alone?
#
#     benches/tools/merge.sh [FOLDER] [ROUNDS]
#
# Writes a synthetic checkpoint (6.9 GB) and a rank-32 adapter over all its linear layers into FOLDER, which needs 22 GB,
# unless they are there already. Then `cp` with fsync and `lora merge`, which also syncs, in turns, ROUNDS times (3):
# wall time and peak resident memory of each, and the time of `lora inspect` on the adapter. Needs GNU time.
set -euo pipefail

folder=${1:-$(mktemp -d)}
rounds=${2:-3}
lora=${LORA:-target/release/lora}
mkdir -p "$folder"
[ -f "$folder/adapter.safetensors" ] ||
    cargo run --quiet --release -p lora-core --example synthetic_checkpoint -- "$folder" 32
ls -l "$folder"/sdxl.safetensors "$folder"/adapter.safetensors | awk '{print $5, $9}'

measured() { # what, command...
    local what=$1
    shift
    /usr/bin/time -f "$what: %e s, %M KiB resident, user %U s, system %S s" "$@" > /dev/null
}

for ((round = 1; round <= rounds; round++)); do
    echo "round $round"
    rm -f "$folder/copy.safetensors" "$folder/merged.safetensors"
    sync
    # coreutils sync with a file name is fsync of that file.
    measured "cp + fsync" sh -c "cp '$folder/sdxl.safetensors' '$folder/copy.safetensors' && sync '$folder/copy.safetensors'"
    rm -f "$folder/copy.safetensors"
    sync
    measured "lora merge" "$lora" merge -q --base "$folder/sdxl.safetensors" --lora "$folder/adapter.safetensors:0.8" \
        --out "$folder/merged.safetensors"
    measured "lora inspect" "$lora" inspect "$folder/adapter.safetensors"
done
rm -f "$folder/merged.safetensors"

#!/usr/bin/env bash
# Is anything lost when a run is killed, whenever that is?
#
#     benches/kill.sh [KILLS] [LORA]
#
# Trains once undisturbed, then again with `kill -9` at a random moment KILLS times (50), going on with `--resume` after
# each. After every kill it looks at what is left: every tensor file outside folders that are still being staged must be
# sound, and the resumed run must go on at most one save interval before the last logged step. At the end both adapters must
# be equal, bit for bit. Prints one line a kill and ends with 1 if anything does not hold.
set -euo pipefail

kills=${1:-50}
lora=${2:-target/release/lora}
interval=5
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
options=(assets/styles/neon --base assets/tiny-sd --name neon --steps 500 --batch 2 --rank 4 --save-every "$interval"
    --sample-every 0 --lr 1e-3 --device cpu -q)

# Whole lines in the log; a resumed run first cuts off those after its checkpoint.
logged() { wc -l 2> /dev/null < "$work/killed/metrics.jsonl" || echo 0; }

"$lora" train "${options[@]}" --out "$work/whole" > /dev/null
"$lora" train "${options[@]}" --out "$work/killed" > /dev/null &
pid=$!
for ((kill = 1; kill <= kills; kill++)); do
    # Past the start of the process, so that kills hit steps and saves; one in eight hits the start itself.
    before=$(logged)
    if [ $((RANDOM % 8)) -gt 0 ]; then
        for ((tenth = 0; tenth < 300 && $(logged) <= before; tenth++)); do sleep 0.1; done
    fi
    sleep "0.$((RANDOM % 4))$((RANDOM % 10))"
    kill -9 "$pid" 2> /dev/null || true
    wait "$pid" 2> /dev/null || true
    steps=$(logged)
    newest=0
    for folder in "$work"/killed/checkpoints/step-*; do
        [ -d "$folder" ] || continue
        [ -f "$folder/state.json" ] || { echo "kill $kill: $folder has no record"; exit 1; }
        for file in "$folder"/*.safetensors; do
            "$lora" inspect "$file" --json > /dev/null 2>&1 || python3 - "$file" <<'PY' || { echo "kill $kill: $file is not sound"; exit 1; }
import json, struct, sys
data = open(sys.argv[1], "rb").read()
size = struct.unpack("<Q", data[:8])[0]
header = json.loads(data[8 : 8 + size])
end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
sys.exit(8 + size + end != len(data))
PY
        done
        step=$((10#${folder##*-}))
        [ "$step" -gt "$newest" ] && newest=$step
    done
    # The step that was under way is not logged, so one interval and one step may lie between.
    [ $((steps - newest)) -le $((interval + 1)) ] || { echo "kill $kill: $((steps - newest)) steps lost"; exit 1; }
    echo "kill $kill: step $steps logged, goes on from $newest"
    if [ -f "$work/killed/neon.safetensors" ]; then break; fi
    "$lora" train --resume "$work/killed" -q > /dev/null &
    pid=$!
done
wait "$pid" 2> /dev/null || true
[ -f "$work/killed/neon.safetensors" ] || "$lora" train --resume "$work/killed" -q > /dev/null
cmp "$work/whole/neon.safetensors" "$work/killed/neon.safetensors"
left=$(find "$work/killed" -name '*.part' | wc -l)
[ "$left" -eq 0 ] || { echo "$left half-written files are left"; exit 1; }
echo "equal after $((kill > kills ? kills : kill)) kills"

#!/usr/bin/env bash
# Makes the golden directories of contract version 2, which is of LoRA adapters: `tests/golden/make_adapters.sh`.
set -euo pipefail
cd "$(dirname "$0")"
place=contract-2
[ ! -e "$place" ] || {
    echo "$place is there; a released contract is kept as it was written" >&2
    exit 1
}
tool() { BATON_REVISION=golden "../../tools/$1/.venv/bin/$1" "${@:2}"; }

mkdir "$place"
tool sft train --source contract-1/megatron --data contract-1/conversations --target "$place/adapter-run" --lora-rank 2 \
    --lora-targets q_proj,v_proj --steps 1 --global-batch-size 2 --learning-rate 1e-2 --warmup-steps 0 --precision fp32 \
    --validate-every 0 --track none
rm -rf "$place"/adapter-run/{metrics.jsonl,report.html}
tool convert to-hf --source "$place/adapter-run" --base contract-1/hf --target "$place/adapter"
for name in adapter-run adapter; do
    sed -i 's/"created": "[^"]*"/"created": "2000-01-01T00:00:00+00:00"/' "$place/$name/manifest.json"
done

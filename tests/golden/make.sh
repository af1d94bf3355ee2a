#!/usr/bin/env bash
# Makes the golden directories of contract version 1 with the tools as they are now: `tests/golden/make.sh`.
# Version 2 is of LoRA adapters only: make_adapters.sh.
# A contract that was released is never made again: add the next version's beside it, and every reader must read both.
set -euo pipefail
cd "$(dirname "$0")"
root=../..
place=contract-1
[ ! -e "$place" ] || {
    echo "$place is there; a released contract is kept as it was written" >&2
    exit 1
}
tool() { BATON_REVISION=golden "$root/tools/$1/.venv/bin/$1" "${@:2}"; }
settle() { # the time of making is the one thing in a manifest that nobody reads again
    sed -i 's/"created": "[^"]*"/"created": "2000-01-01T00:00:00+00:00"/' "$place/$1/manifest.json"
}

mkdir "$place"
tool pretrain tokenizer --source text --target "$place/tokenizer" --vocab-size 288
settle tokenizer
tool convert init --model-config model.json --tokenizer "$place/tokenizer" --target "$place/hf"
settle hf
tool convert to-megatron --source "$place/hf" --target "$place/megatron"
settle megatron
tool pretrain prepare --source text --tokenizer "$place/tokenizer" --target "$place/dataset"
settle dataset
tool sft prepare --source conversations.jsonl --tokenizer "$place/tokenizer" --target "$place/conversations" \
    --sequence-length 64
settle conversations
du -sb "$place"/*

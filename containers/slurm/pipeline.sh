#!/usr/bin/env bash
# The road of one model as a chain of Slurm jobs; prints the id and name of each. A stage starts when those it reads from
# have ended well; when one fails, those behind it are cancelled. The same command again submits the chain anew, and what
# is finished says so and ends at once.
#
#   containers/slurm/pipeline.sh MODEL DATA WORK
#
# MODEL is a Hugging Face directory; DATA holds text/, chats.jsonl, preferences.jsonl and prompts.jsonl; every stage
# publishes a directory of its name under WORK. The environment says what differs from model to model and site to site:
#   ON_CPU ON_TRAIN ON_RLHF ON_INFER   sbatch's options for each kind of stage, such as "--nodes=2 --ntasks-per-node=8"
#   PRETRAIN_FLAGS SFT_FLAGS ...       further flags of a stage, by the name printed for it
#   REWARD_FUNCTIONS                   what PPO is rewarded by besides the reward model: py:FILE:FUNCTION
#   IMAGE MOUNTS MAX_REQUEUES          as stage.sbatch has them
set -Eeuo pipefail
[ $# -eq 3 ] || {
    echo "usage: ${0##*/} MODEL DATA WORK" >&2
    exit 2
}
model=$1 data=$2 work=$3
here=$(cd "$(dirname "$0")" && pwd)
for tool in convert pretrain sft rlhf infer; do PATH+=:$here/../../tools/$tool/.venv/bin; done
mkdir -p "$work/logs"

submitted=()
trap '[ ${#submitted[@]} -eq 0 ] || scancel "${submitted[@]}"' ERR # a chain that cannot be submitted whole is not begun

submit() { # NAME "SBATCH OPTIONS" "IDS TO WAIT FOR" COMMAND...; the new id is in $id
    local name=$1 options=() flags=() variable
    read -ra options <<<"$2"
    [ -z "$3" ] || options+=(--dependency="afterok:${3// /:}" --kill-on-invalid-dep=yes)
    shift 3
    variable=${name^^}_FLAGS
    variable=${variable//-/_}
    read -ra flags <<<"${!variable-}"
    id=$(sbatch --parsable --job-name="$name" --output="$work/logs/%x-%j.log" "${options[@]}" \
        "$here/stage.sbatch" "$@" "${flags[@]}")
    id=${id%%;*} # of a federation: "id;cluster"
    submitted+=("$id")
    echo "$id $name"
}

cpu=${ON_CPU-} train=${ON_TRAIN-} rlhf=${ON_RLHF-} infer=${ON_INFER-}
submit to-megatron "$cpu" "" convert to-megatron --source "$model" --target "$work/to-megatron"
submit verify "$cpu" "$id" convert verify --source "$model" --target "$work/to-megatron"
verify=$id
submit corpus "$cpu" "" pretrain prepare --source "$data/text" --tokenizer "$model" --target "$work/corpus"
submit pretrain "$train" "$verify $id" \
    pretrain train --source "$work/to-megatron" --data "$work/corpus" --target "$work/pretrain"
pretrain=$id
submit chats "$cpu" "" sft prepare --source "$data/chats.jsonl" --tokenizer "$model" --target "$work/chats"
submit sft "$train" "$pretrain $id" sft train --source "$work/pretrain" --data "$work/chats" --target "$work/sft"
submit to-hf "$cpu" "$id" convert to-hf --source "$work/sft" --target "$work/to-hf"
submit reward "$rlhf" "$id" rlhf reward --source "$work/to-hf" --data "$data/preferences.jsonl" --target "$work/reward"
submit ppo "$rlhf" "$id" rlhf ppo --source "$work/to-hf" --prompts "$data/prompts.jsonl" --target "$work/ppo" \
    --reward "model:$work/reward${REWARD_FUNCTIONS:+,$REWARD_FUNCTIONS}"
submit generate "$infer" "$id" infer generate --source "$work/ppo" --prompts "$data/prompts.jsonl" --target "$work/generate"

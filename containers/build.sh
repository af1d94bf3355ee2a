#!/usr/bin/env bash
# Build a tool's image: `containers/build.sh convert`; `containers/build.sh convert logits` adds what verify's logits need.
# Tagged with the version in tools/<tool>/pyproject.toml, and `latest` (`convert:0.1.0-logits` and `convert:logits`).
# From the environment:
#   BASES        registry: each Dockerfile's own default base, for GPUs; local: bases made here (base-image.sh, torch/).
#                By default registry where nvidia-smi answers, local elsewhere.
#   BASE_IMAGE   this very base
#   WHEELS       a directory of wheels; then the build uses no network
#   BATON_TRLX   a checkout of trlx, which the rlhf image gets for `rlhf ppo --backend trlx`
#   SOURCE_TREE  the tree to build from, by default this one
#   LATEST=no    leave the tag `latest` where it is
#   SOURCE       the address of the source, for the image's label
#   RECORDS      folder for the SBOM and the provenance, by default image-records; `no` for none (supply_chain.py)
#   CACHE=no     build every step anew
#   PIP_CONFIG_FILE, PIP_INDEX_URL, SSL_CERT_FILE, PIP_CERT: as for pip; they reach the build as secrets, no image has them
set -euo pipefail
cd "$(dirname "$0")/.."
tool=$1 variant=${2:-}
tree=${SOURCE_TREE:-$PWD}
if [ "${RECORDS:-}" != no ] && [ ! -x containers/.venv/bin/python ]; then
    echo "containers/build.sh: no containers/.venv to write the records with: make containers/.venv/.ready, or RECORDS=no" >&2
    exit 2
fi

bases=${BASES:-}
if [ -z "$bases" ]; then
    if nvidia-smi -L >/dev/null 2>&1; then bases=registry; else bases=local; fi
fi

# Index and certificates of this machine's pip, for the length of a build step.
secrets=$(mktemp -d)
trap 'rm -rf "$secrets"' EXIT
given=()
{
    echo '[global]'
    for key in index-url extra-index-url trusted-host; do
        variable=PIP_$(tr 'a-z-' 'A-Z_' <<<"$key")
        value=${!variable:-$(python3 -m pip config get "global.$key" 2>/dev/null || true)}
        # an index in a folder of this machine is not there in the build
        value=$(tr ' ' '\n' <<<"$value" | grep -v '^file:' | tr '\n' ' ' || true)
        if [ -n "${value// /}" ]; then echo "$key = $value"; fi
    done
} >"$secrets/pip.conf"
if [ "$(wc -l <"$secrets/pip.conf")" -gt 1 ]; then given+=(--secret "id=pip.conf,src=$secrets/pip.conf"); fi
certificates=${PIP_CERT:-${SSL_CERT_FILE:-$(python3 -m pip config get global.cert 2>/dev/null || true)}}
if [ -n "$certificates" ]; then given+=(--secret "id=ca.crt,src=$certificates"); fi
if [ -n "${WHEELS:-}" ]; then given+=(--build-context "wheels=$WHEELS" --network none); fi

build() { # FOLDER TAG OPTION ...
    local log=$secrets/$1.log
    docker buildx build --load --progress plain --provenance=false "${given[@]}" \
        --file "$tree/containers/$1/Dockerfile" --tag "$2" "${@:3}" "$tree" >"$log" 2>&1 || {
        tail -n 60 "$log" >&2
        echo "containers/build.sh: building $2 failed" >&2
        exit 1
    }
}

local_base() { # the base that this tool takes on a machine without a registry
    containers/base-image.sh >&2
    if [ "$tool$variant" = convert ]; then
        echo localhost/python:slim
        return
    fi
    build torch localhost/python:torch # at once where nothing changed
    echo localhost/python:torch
}

case "$tool$variant" in
convert | pretrain | sft | rlhf | infer) suffix='' ;;
convertlogits) suffix=-logits ;;
*)
    echo "containers/build.sh: $tool $variant is no image; one of: convert, convert logits, pretrain, sft, rlhf, infer" >&2
    exit 2
    ;;
esac
base=${BASE_IMAGE:-}
if [ -z "$base" ] && [ "$bases" = local ]; then base=$(local_base); fi
arguments=()
if [ -z "$base" ]; then
    base=$(sed -n 's/^ARG BASE_IMAGE=//p' "$tree/containers/$tool/Dockerfile")
    if [ -n "$suffix" ]; then base=$(sed -n 's/^ARG BASE_IMAGE=//p' "$tree/containers/pretrain/Dockerfile"); fi
elif [ "$tool" = infer ] && [ "$bases" = local ]; then
    arguments+=(--build-arg LOCK=requirements.lock) # vLLM's build for CPUs
fi
if [ -n "$suffix" ]; then arguments+=(--build-arg LOCK=requirements.lock); fi
digest=${base##*@}
if [ "$digest" = "$base" ]; then # an image made here has an id and no digest
    digest=$(docker image inspect --format '{{.Id}}' "$base" 2>/dev/null || true)
fi
if [ "$tool" = rlhf ] && [ -n "${BATON_TRLX:-}" ]; then
    if [ ! -f "$BATON_TRLX/trlx/__init__.py" ]; then
        echo "containers/build.sh: BATON_TRLX $BATON_TRLX is no checkout of trlx; a wheel is to be unpacked" >&2
        exit 2
    fi
    given+=(--build-context "trlx=$BATON_TRLX")
    arguments+=(--build-arg BATON_TRLX=/opt/baton/trlx)
fi
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$tree/tools/$tool/pyproject.toml")
revision=$(git -C "$tree" rev-parse HEAD 2>/dev/null || true)
if [ -n "$revision" ] && [ -n "$(git -C "$tree" status --porcelain -- shared "tools/$tool" containers 2>/dev/null)" ]; then
    revision=$revision-modified
fi
lock=$(printf '%s\n' "${arguments[@]}" | sed -n 's/^LOCK=//p')
lock=$tree/tools/$tool/${lock:-$(sed -n 's/^ARG LOCK=//p' "$tree/containers/$tool/Dockerfile")}
if [ "${CACHE:-}" = no ]; then arguments+=(--no-cache); fi
began=$SECONDS
build "$tool" "$tool:$version$suffix" "${arguments[@]}" --build-arg "BASE_IMAGE=$base" --build-arg "BASE_DIGEST=$digest" \
    --build-arg "VERSION=$version" --build-arg "REVISION=$revision" --build-arg "SOURCE=${SOURCE:-}" \
    --label "baton.lock.sha256=$(sha256sum "$lock" | cut -d ' ' -f 1)"
if [ "${LATEST:-}" != no ]; then docker tag "$tool:$version$suffix" "$tool:${variant:-latest}"; fi
size=$(docker image inspect --format '{{.Size}}' "$tool:$version$suffix" | awk '{printf "%.0f MB", $1 / 1e6}')
if [ "${RECORDS:-}" != no ]; then
    containers/.venv/bin/python containers/supply_chain.py record "$tool:$version$suffix" >&2
fi
echo "$tool:$version$suffix on $base: $size, built in $((SECONDS - began)) s"

#!/usr/bin/env bash
# Resolve requirements.lock of the named tools, of the tests, of the linters and of image builds: pinned, with hashes, no index address.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$(command -v uv || echo "$PWD/.uv/bin/uv")
python=$PWD/tools/pretrain/.venv/bin/python

lock() { # FOLDER SOURCE [LOCK-FILE OPTION ...]
    local folder=$1 source=$2 file=${3:-requirements.lock}
    (cd "$folder" && "$uv" pip compile --quiet --python "$python" --universal --python-version 3.12 --generate-hashes \
        --no-emit-index-url --no-header --no-annotate "${@:4}" --output-file "$file" "$source")
}

for tool in "$@"; do
    if [ "$tool" = infer ]; then
        lock tools/infer pyproject.toml requirements.lock --extra cpu --override overrides.txt
        lock tools/infer pyproject.toml requirements.gpu.lock --extra gpu
    elif [ "$tool" = convert ]; then
        lock tools/convert pyproject.toml requirements.lock --extra logits
        lock tools/convert pyproject.toml requirements.slim.lock --constraint requirements.lock
    else
        lock "tools/$tool" pyproject.toml
    fi
done
lock tests requirements.in
lock tests/lint requirements.in
lock tests/hostile requirements.in
lock tests/peers requirements.in requirements.lock --override overrides.txt
lock containers requirements.in
lock containers/install installer.in installer.lock

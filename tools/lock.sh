#!/usr/bin/env bash
# Resolve requirements.lock of the named tools, of the tests and of the linters: pinned, with hashes, no index address.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$(command -v uv || echo "$PWD/.uv/bin/uv")
python=$PWD/tools/pretrain/.venv/bin/python

lock() { # FOLDER SOURCE
    local overrides=()
    if [ -f "$1/overrides.txt" ]; then overrides=(--override overrides.txt); fi
    (cd "$1" && "$uv" pip compile --quiet --python "$python" --universal --python-version 3.12 --generate-hashes \
        --no-emit-index-url --no-header --no-annotate "${overrides[@]}" --output-file requirements.lock "$2")
}

for tool in "$@"; do lock "tools/$tool" pyproject.toml; done
lock tests requirements.in
lock tests/lint requirements.in

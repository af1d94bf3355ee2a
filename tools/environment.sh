#!/usr/bin/env bash
# Make FOLDER/.venv from FOLDER/requirements.lock: `tools/environment.sh tools/convert`.
# Needs a Python 3.12 or 3.13 somewhere and nothing else; uv is installed beside the repository's files if it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1
export UV_PYTHON_DOWNLOADS=never # a Python that this machine does not have is named below, not fetched

find_python() {
    local candidate
    for candidate in python3.12 python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23].*/bin/python; do
        # a version manager's shim can be on PATH for a version that is not active: only a run tells
        if "$candidate" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
}

find_uv() { # PYTHON
    if command -v uv; then return; fi
    if [ ! -x .uv/bin/uv ]; then
        rm -rf .uv
        "$1" -m venv .uv
        .uv/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9 >&2
    fi
    echo .uv/bin/uv
}

python=$(find_python)
uv=$(find_uv "${python:-python3}")
if [ -z "$python" ]; then
    python=$("$uv" python find --quiet '>=3.12,<3.14' 2>/dev/null) || {
        echo "No Python 3.12 or 3.13 found on PATH, under ~/.pyenv or by uv; install one (for example: uv python install 3.12)" >&2
        exit 1
    }
fi
environment="$folder/.venv"
rm -rf "$environment"
"$uv" venv --quiet --python "$python" "$environment"
install() { "$uv" pip install --quiet --python "$environment/bin/python" --no-deps "$@"; }
lock="$folder/requirements.lock"
if [ -f "$folder/requirements.gpu.lock" ] && nvidia-smi -L >/dev/null 2>&1; then lock="$folder/requirements.gpu.lock"; fi
install --require-hashes --requirement "$lock"
if [ -f "$folder/pyproject.toml" ]; then
    install --require-hashes --requirement tests/requirements.lock
    install --editable "$folder"
fi
# tools/infer/vllm-metadata says why; the CUDA build does not need it
if [ -d "$folder/vllm-metadata" ] && [ "$lock" = "$folder/requirements.lock" ]; then install "./$folder/vllm-metadata"; fi
# the CUDA runtime of stubs that --rehearse preloads; a line says so where there is no compiler
case $folder in tools/pretrain | tools/sft) "$environment/bin/python" -m shared.rehearsal.build_stubs ;; esac
touch "$environment/.ready"

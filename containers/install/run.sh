#!/usr/bin/env bash
# Runs inside an image build, bind-mounted: installs into the environment /opt/baton, and leaves nothing else behind.
#   run.sh dependencies LOCK         what the lock names, by hash, less what the base image brings (requirements.py)
#   run.sh tool ROOT FOLDER          the tool in ROOT/FOLDER, built from a copy of ROOT
#   run.sh base LOCK                 what the lock names, into the system's own Python
# Packages come from the index, or from the build context `wheels` if that holds any; then no network is used.
set -euo pipefail

readonly ENVIRONMENT=/opt/baton
here=$(cd "$(dirname "$0")" && pwd)

# Only for the length of this build step: the caller's index and certificates, neither of them in the image.
if [ -s /run/secrets/ca.crt ]; then export SSL_CERT_FILE=/run/secrets/ca.crt PIP_CERT=/run/secrets/ca.crt; fi
if [ -s /run/secrets/pip.conf ]; then
    export PIP_CONFIG_FILE=/run/secrets/pip.conf
    UV_DEFAULT_INDEX=$(python3 -m pip config get global.index-url 2>/dev/null || true)
    UV_INDEX=$(python3 -m pip config get global.extra-index-url 2>/dev/null || true)
    export UV_DEFAULT_INDEX UV_INDEX
fi
[ -n "${UV_DEFAULT_INDEX:-}" ] || unset UV_DEFAULT_INDEX
[ -n "${UV_INDEX:-}" ] || unset UV_INDEX
unset PIP_CONSTRAINT # NVIDIA's images set it; the lock is stricter
# Compiled files of two builds are equal: the order of sets is in them, and by default the time at which a source was written.
export PYTHONHASHSEED=0 PYC_INVALIDATION_MODE=CHECKED_HASH
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_BREAK_SYSTEM_PACKAGES=1
export UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy UV_HTTP_TIMEOUT=300 UV_NO_PROGRESS=1 UV_BREAK_SYSTEM_PACKAGES=1

offline=()
if compgen -G '/wheels/*' >/dev/null; then offline=(--no-index --find-links /wheels); fi

# The installer itself, kept with its downloads in the build's cache mount.
tools=/var/cache/baton/installer-$(sha256sum "$here/installer.lock" | cut -c -12)
export UV_CACHE_DIR=/var/cache/baton/uv
if [ ! -x "$tools/bin/uv" ]; then
    python3 -m pip install --quiet --no-cache-dir --no-compile --no-deps --require-hashes "${offline[@]}" \
        --only-binary :all: --target "$tools.$$" --requirement "$here/installer.lock"
    mv -T "$tools.$$" "$tools" || [ -x "$tools/bin/uv" ] # another build was first
fi
install() { # PYTHON ARGUMENT ...
    "$tools/bin/uv" pip install --python "$1" --no-deps "${offline[@]}" --build-constraint "$here/installer.lock" "${@:2}"
}
wanted=$(mktemp)
trap 'rm -f "$wanted"' EXIT

case $1 in
dependencies)
    # the base's own packages stay visible, and are never replaced
    python3 -m venv --without-pip --system-site-packages "$ENVIRONMENT"
    python3 "$here/requirements.py" "$2" >"$wanted"
    install "$ENVIRONMENT/bin/python" --require-hashes --compile-bytecode --requirement "$wanted"
    ;;
tool)
    source=/tmp/baton-source # a build writes beside its source, which is mounted read-only; the place is recorded
    mkdir "$source"
    cp -R "$2/." "$source"
    install "$ENVIRONMENT/bin/python" --compile-bytecode --reinstall "$source/$3"
    rm -rf "$source"
    # the CUDA runtime of stubs that --rehearse preloads, for the torch of this image
    case $3 in tools/pretrain | tools/sft) (cd / && "$ENVIRONMENT/bin/python" -m shared.rehearsal.build_stubs) ;; esac
    # Two builds of one commit have the same files: without the time of this one.
    for cached in "$ENVIRONMENT"/lib/python3*/site-packages/*.dist-info/uv_cache.json; do
        rm -f "$cached"
        sed -i '/uv_cache\.json/d' "$(dirname "$cached")/RECORD"
    done
    ;;
base)
    install "$(command -v python3)" --require-hashes --requirement "$2"
    ;;
esac

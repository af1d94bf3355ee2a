#!/usr/bin/env bash
# localhost/python:slim, a Python 3.13 on Debian 13 made from the Debian archive: a base image where no registry is reached.
# Does nothing if the tag exists, since a new image would make every layer on top cold; prints its size.
set -euo pipefail

readonly SAY=containers/base-image.sh TAG=localhost/python:slim SUITE=trixie
# ca-certificates: TLS for pip. libnuma1: vLLM's build for CPUs links to it.
readonly PACKAGES=python3,python3-pip,ca-certificates,libnuma1

fail() {
    echo "$SAY: $*" >&2
    exit 1
}
size() { docker image inspect --format '{{.Size}}' "$TAG" | awk '{printf "%.0f MB\n", $1 / 1e6}'; }

mirror() { # the first plain Debian archive among this machine's own sources
    local file
    for file in /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list /etc/apt/sources.list; do
        [ -f "$file" ] && grep -v '^[[:space:]]*#' "$file" || true
    done | grep -oE 'https?://[^[:space:]]+/debian/?([[:space:]]|$)' | tr -d '[:blank:]' | head -n 1
}

exec 8>/tmp/baton-base-image.lock
flock 8
if docker image inspect "$TAG" >/dev/null 2>&1; then
    echo "$SAY: $TAG is there, $(size)"
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    fail "making $TAG needs root on Debian; elsewhere build on a registry's image: make images BASES=registry"
fi
archive=$(mirror)
[ -n "$archive" ] || fail "this machine's apt sources name no Debian archive"
if ! command -v mmdebstrap >/dev/null; then
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends mmdebstrap debian-archive-keyring >/dev/null 2>&1
fi
began=$SECONDS
place=$(mktemp -d)
log=$place/log
# Without recommended packages, documentation, translations, apt's lists and logs, and any trace of the archive's address.
# shellcheck disable=SC2016 # "$1" is for the shells that mmdebstrap starts
mmdebstrap --quiet --variant=minbase --mode=root --include="$PACKAGES" \
    --aptopt='APT::Install-Recommends "false"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/* "$1"/var/log/* "$1"/etc/apt/apt.conf.d/99mmdebstrap' \
    --customize-hook='rm -f "$1"/etc/hostname "$1"/etc/resolv.conf "$1"/etc/machine-id' \
    --customize-hook=': >"$1"/etc/apt/sources.list' \
    "$SUITE" "$place/root.tar" "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $archive $SUITE main" 2>"$log" || {
    tail -n 20 "$log" >&2
    fail "mmdebstrap failed; the whole log is $log"
}
docker import --change 'CMD ["python3"]' --message "Debian $SUITE with $PACKAGES" "$place/root.tar" "$TAG" >/dev/null
rm -rf "$place"
echo "$SAY: made $TAG in $((SECONDS - began)) s, $(size)"

#!/usr/bin/env bash
# A running Docker engine with buildx and compose: does nothing where there is one, installs it where it can be had.
# `containers/engine.sh`; says in one line what it did. Needs root and Debian 12 or 13 only if something is missing.
# `containers/engine.sh --check` installs and starts nothing: it exits 1 and gives the reason where that cannot be done.
set -euo pipefail

readonly SAY=containers/engine.sh
readonly DAEMON_LOG=/var/log/baton-dockerd.log

fail() {
    echo "$SAY: $*" >&2
    exit 1
}
answers() { docker info >/dev/null 2>&1; }
complete() { docker buildx version >/dev/null 2>&1 && docker compose version >/dev/null 2>&1; }
describe() { docker version --format 'engine {{.Server.Version}}, client {{.Client.Version}}'; }

# The first plain Debian archive among this machine's own sources: its address is written down nowhere else.
mirror() {
    local file
    for file in /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list /etc/apt/sources.list; do
        [ -f "$file" ] && grep -v '^[[:space:]]*#' "$file" || true
    done | grep -oE 'https?://[^[:space:]]+/debian/?([[:space:]]|$)' | tr -d '[:blank:]' | head -n 1
}

able_to_install() {
    [ "$(id -u)" = 0 ] || fail "no Docker engine answers, and installing one needs root: install Docker, or run this as root"
    grep -qE '^(12|13)' /etc/debian_version 2>/dev/null ||
        fail "no Docker engine answers, and this script can install one on Debian 12 and 13 only: install Docker"
    [ -n "$(mirror)" ] || fail "no Docker engine answers, and this machine's apt sources name no Debian archive"
}

# Bookworm's docker.io has no buildx and no compose v2. The next release's five packages run on bookworm's libraries.
install_engine() {
    local place options archive
    archive=$(mirror)
    place=$(mktemp -d)
    mkdir -p "$place"/lists/partial "$place"/cache/archives/partial
    {
        apt-get update -qq
        # from this release: they need its libc
        apt-get install -y -qq --no-install-recommends runc iptables tini ca-certificates debian-archive-keyring
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $archive trixie main" >"$place/sources.list"
        options=(-o Dir::Etc::SourceList="$place/sources.list" -o Dir::Etc::SourceParts=/dev/null
            -o Dir::State::Lists="$place/lists" -o Dir::Cache="$place/cache" -o APT::Sandbox::User=root)
        apt-get "${options[@]}" update -qq
        (cd "$place" && apt-get "${options[@]}" download docker.io docker-cli containerd docker-buildx docker-compose)
        apt-get install -y -qq --no-install-recommends "$place"/*.deb
    } >"$place/log" 2>&1 || {
        tail -n 20 "$place/log" >&2
        fail "installing the engine failed; the whole log is $place/log"
    }
    rm -rf "$place"
}

start_daemon() {
    local waited
    [ "$(id -u)" = 0 ] || fail "dockerd is installed and not running, and starting it needs root"
    setsid dockerd >"$DAEMON_LOG" 2>&1 </dev/null 9>&- & # it outlives this script, and does not hold its lock
    for ((waited = 0; waited < 60; waited++)); do
        if answers; then return; fi
        sleep 0.5
    done
    tail -n 20 "$DAEMON_LOG" >&2
    fail "dockerd does not answer; its log is $DAEMON_LOG"
}

if answers && complete; then
    echo "$SAY: nothing to do ($(describe))"
    exit 0
fi
installed() { command -v dockerd >/dev/null && complete; }
if [ "${1:-}" = --check ]; then
    if ! installed; then able_to_install; fi
    [ "$(id -u)" = 0 ] || fail "dockerd is installed and not running, and starting it needs root"
    exit 0
fi
exec 9>/tmp/baton-engine.lock # two at once would fight over dpkg and the socket
flock 9
did=''
if ! installed; then
    able_to_install
    install_engine
    hash -r
    did='installed the engine, buildx and compose; '
fi
if ! answers; then
    start_daemon
    did+='started dockerd; '
fi
complete || fail "docker buildx or docker compose does not answer"
echo "$SAY: ${did:-another one was faster; }$(describe)"

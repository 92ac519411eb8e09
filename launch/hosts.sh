#!/usr/bin/env bash
# Runs a command across hosts that ssh reaches, on a Ray cluster that lasts as long as the command:
#
#   launch/hosts.sh HEAD HOST... -- dmx train --workers 3 ...
#
# The command runs on HEAD, which computes too. Every host wants this clone and the environment of `dmx` at the
# same paths, and sees the current folder. Each host's Ray log is HOST.log in DMX_LOGS.
#
#   DMX_SSH           the ssh command (ssh)
#   DMX_BIN           folder of dmx and ray (that of the `dmx` found here)
#   DMX_LOGS          folder of the logs (a fresh one under /tmp)
#   DMX_START_S       seconds for all hosts to come (120)
#   DMX_ALIVE_S       seconds after which a silent host counts as gone (30)
#   DMX_PORT, DMX_CPUS, DMX_OBJECT_STORE_BYTES, OMP_NUM_THREADS, GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME: passed on to every host
set -euo pipefail

hosts=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do hosts+=("$1") && shift; done
if [ ${#hosts[@]} -eq 0 ] || [ $# -lt 2 ]; then
    echo "usage: launch/hosts.sh HEAD HOST... -- COMMAND..." >&2
    exit 2
fi
shift
head=${hosts[0]}
launch=$(cd "$(dirname "$0")" && pwd)
bin=${DMX_BIN:-$(dirname "$(command -v dmx)")}
logs=${DMX_LOGS:-$(mktemp -d /tmp/dmx-logs-XXXXXX)}
alive=${DMX_ALIVE_S:-30}
read -ra ssh <<<"${DMX_SSH:-ssh}"
ssh+=(-o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=$((alive / 3)) -o ServerAliveCountMax=3)
token=$("$launch/token.sh")
port=${DMX_PORT:-6379}

# A command as one word for ssh: in the current folder, with the environment's programs and settings.
there() {
    printf 'cd %q && DMX_BIN=%q' "$PWD" "$bin"
    for name in DMX_PORT DMX_CPUS DMX_ALIVE_S DMX_OBJECT_STORE_BYTES OMP_NUM_THREADS GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME; do
        [ -z "${!name:-}" ] || printf ' %s=%q' "$name" "${!name}"
    done
    printf ' RAY_ADDRESS=%q' "$head:$port"
    printf ' %q' "$launch/attached.sh" "$@"
}

# What is written to a pipe reaches the host as standard input; while it is open, the host's Ray lasts.
pipes=() nodes=() own='' running=''
finish() {
    # The command first: it saves what it has, and cannot without its Ray.
    [ -z "$own" ] || { exec {own}>&- && wait "$running" 2>/dev/null || true; }
    for pipe in "${pipes[@]}"; do exec {pipe}>&-; done
    wait "${nodes[@]}" 2>/dev/null || true
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
for host in "${hosts[@]}"; do
    exec {pipe}> >(exec "${ssh[@]}" "$host" "$(there "$launch/ray_node.sh" "$head")" >"$logs/$host.log" 2>&1)
    nodes+=($!) pipes+=("$pipe")
    cat "$token" <(echo) >&"$pipe"
done

# The command's standard input is such a pipe too.
on_head() {
    local status=0
    exec {own}> >(exec "${ssh[@]}" "$head" "$(there "$@")")
    running=$!
    cat "$token" <(echo) >&"$own"
    wait "$running" || status=$?
    exec {own}>&-
    own=''
    return "$status"
}
status=0
on_head python -m dmx.ray_cluster "${#hosts[@]}" "${DMX_START_S:-120}" || status=$?
[ "$status" != 0 ] || on_head "$@" || status=$?
if [ "$status" = 255 ]; then
    echo "error: the head, $head, ended or was silent for $alive s (logs: $logs): once it is back, or with another" \
        "host in its place, run the same command again, which goes on from the last checkpoint or part" >&2
fi
exit "$status"

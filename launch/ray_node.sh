#!/usr/bin/env bash
# This host's part of a Ray cluster, in the foreground, until SIGTERM:
#
#   launch/ray_node.sh HEAD     HEAD: name or private address of the head, the same on every host
#
# The host that has the address is the head. Ray and its dashboard listen on the private address that leads to
# the head, and take only what bears the token (RAY_AUTH_TOKEN, or a file: see token.sh).
#
#   DMX_PORT       the head's port (6379)
#   DMX_CPUS       cores that this host gives (all that it may use)
#   DMX_ALIVE_S    seconds after which a silent host, or a silent head, counts as gone (30)
#   DMX_RAY_TMP    folder of Ray's own logs and sockets, with a short path (a fresh one)
set -euo pipefail

fail() {
    echo "error: $(hostname): $1" >&2
    exit 2
}

name=${1:?usage: launch/ray_node.sh HEAD}
port=${DMX_PORT:-6379}
head=$({ getent ahostsv4 "$name" || true; } | awk '$1 !~ /^127\./ { print $1; exit }')
[ -n "$head" ] || fail "wanted the head's address, found none for '$name' (beyond 127.*): name its private address"
interface=$(ip -4 -o address | awk -v head="$head" '{ split($4, own, "/"); if (own[1] == head) print $2 }')
if [ -n "$interface" ]; then
    address=$head
    role=(--head --port="$port" --include-dashboard=true --dashboard-host="$address")
else
    route=$(ip -4 -o route get "$head") || fail "wanted a way to the head at $head, found none"
    interface=$(sed -n 's/.* dev \([^ ]*\).*/\1/p' <<<"$route")
    address=$(sed -n 's/.* src \([^ ]*\).*/\1/p' <<<"$route")
    role=(--address="$head:$port")
fi
case $address in
    10.* | 192.168.* | 172.1[6-9].* | 172.2[0-9].* | 172.3[01].* | 100.6[4-9].* | 100.[7-9][0-9].* | 100.1[01][0-9].* | 100.12[0-7].*) ;;
    *) fail "wanted a private address for Ray and its dashboard, found $address on $interface: name the head by its private address" ;;
esac

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# The head asks each host four times how it is. Ray's own settings give a silent host 65 s; and they let a host
# that is told to end wait for half a minute, for requests that a service would still be answering.
alive_ms=$((${DMX_ALIVE_S:-30} * 1000))
export RAY_health_check_failure_threshold=4 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
export RAY_health_check_period_ms=$((alive_ms / 12)) RAY_health_check_timeout_ms=$((alive_ms / 6))
export RAY_gcs_rpc_server_reconnect_timeout_s=${DMX_ALIVE_S:-30}
# Workers that decode stay between their tasks: starting others takes seconds of the cores that compute.
export RAY_idle_worker_killing_time_threshold_ms=600000
# Every pass over a split would leave a megabyte of metrics on the head; 1 where Prometheus gathers them.
export RAY_enable_metrics_collection=${RAY_enable_metrics_collection:-0}
# The head keeps what became of a hundred thousand tasks, 2 kB each, unless told otherwise.
export RAY_task_events_max_num_task_in_gcs=${RAY_task_events_max_num_task_in_gcs:-10000}
# By itself glibc has eight arenas for each core, over which what threads keep spreads, epoch by epoch.
export MALLOC_ARENA_MAX=${MALLOC_ARENA_MAX:-$(nproc)}
[ -n "${RAY_AUTH_TOKEN:-}" ] || RAY_AUTH_TOKEN_PATH=$("$(dirname "$0")/token.sh")
[ -n "${RAY_AUTH_TOKEN:-}" ] || export RAY_AUTH_TOKEN_PATH
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}

scratch=${DMX_RAY_TMP:-$(mktemp -dt ray-XXXXXX)}
ray start "${role[@]}" --node-ip-address="$address" --num-cpus="${DMX_CPUS:-$(nproc)}" --temp-dir="$scratch" \
    --object-store-memory="${DMX_OBJECT_STORE_BYTES:-1000000000}" --disable-usage-stats --block &
node=$!
trap 'kill "$node" 2>/dev/null || true' TERM INT
status=0
wait "$node" || status=$?
wait "$node" 2>/dev/null || true # The first wait ends with the signal; Ray takes a moment longer.
[ -n "${DMX_RAY_TMP:-}" ] || rm -rf "$scratch"
exit "$status"

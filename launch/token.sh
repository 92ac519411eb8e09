#!/usr/bin/env bash
# Prints the path of Ray's token on this host: RAY_AUTH_TOKEN_PATH, or Ray's own ~/.ray/auth_token. A token is
# made where there is none, readable by its owner alone; one that others can read is refused.
set -euo pipefail
umask 077
path=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
if [ ! -s "$path" ]; then
    mkdir -p "$(dirname "$path")"
    fresh=$(mktemp "$path.XXXXXX")
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$fresh"
    ln "$fresh" "$path" 2>/dev/null || [ -s "$path" ] # Of two that make one at once, the first wins.
    rm "$fresh"
fi
mode=$(stat -Lc %a "$path")
if [ "${mode: -2}" != 00 ]; then
    echo "error: $path wants mode 600, found $mode: others may have read the token; remove it, and a new one is made" >&2
    exit 2
fi
echo "$path"

#!/usr/bin/env bash
# Runs a command for as long as standard input lasts, whose first line is Ray's token:
#
#   launch/attached.sh COMMAND...
#
# So nothing stays behind on a host whose caller is gone, and no token stands among a command's arguments.
# Programs are looked for in DMX_BIN first.
set -euo pipefail
export PATH="${DMX_BIN:+$DMX_BIN:}$PATH" # Here, after what the login shell made of it.
read -r RAY_AUTH_TOKEN
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
exec 3<&0
"$@" </dev/null 3<&- &
command=$!
{
    cat <&3 >/dev/null
    kill "$command"
} 2>/dev/null &
watch=$!
status=0
wait "$command" || status=$?
kill "$watch" 2>/dev/null || true
exit "$status"

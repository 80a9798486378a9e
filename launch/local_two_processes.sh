#!/usr/bin/env bash
# Two processes on this machine's CPU, as a rehearsal of a cluster: launch/local_two_processes.sh train --config stage
# Ends when both have ended; if one fails, the other is stopped and the first failure's code is returned.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
program="${PACKFORCING:-.venv/bin/packforcing}"
address="localhost:${PORT:-12355}"
export JAX_PLATFORMS=cpu

"$program" "$@" --coordinator "$address" --processes 2 --process 0 &
first=$!
"$program" "$@" --coordinator "$address" --processes 2 --process 1 &
second=$!
stop() { kill -TERM "$first" "$second" 2>/dev/null || true; }
trap stop INT TERM

code=0
for _ in 1 2; do
  wait -n || { code=$?; stop; break; }
done
wait || true
exit "$code"

#!/usr/bin/env bash
# Several processes on this machine, one GPU each: launch/local_processes.sh --config stage --out runs/stage
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PACKFORCING="${PACKFORCING:-.venv/bin/packforcing}"
PROCESSES="${PROCESSES:-2}"
COORDINATOR="${COORDINATOR:-127.0.0.1:8476}" # another port for a second run on the same machine

unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY # the processes talk to each other directly
command -v "$PACKFORCING" >/dev/null || { echo "$PACKFORCING is missing; run make setup." >&2; exit 2; }

signalled=""
newest="" # the last process that had begun when the signal came
stop() { jobs -pr | xargs -r kill -TERM 2>/dev/null || true; }
trap 'signalled=yes; newest="${!:-none}"; stop' TERM INT # each process finishes its step; together they save

for ((i = 0; i < PROCESSES; i++)); do
  JAX_LOCAL_DEVICE_IDS="$i" "$PACKFORCING" train "$@" \
    --coordinator "$COORDINATOR" --processes "$PROCESSES" --process "$i" &
  if [[ "${newest:-$!}" != "$!" ]]; then kill -TERM "$!" 2>/dev/null || true; fi # begun behind the signal
done

code=0
while true; do
  signalled=""
  status=0
  wait -n || status=$?
  if [[ -n "$signalled" ]]; then continue; fi   # a signal ends the waiting, not the processes
  if ((status == 127)); then break; fi          # none is left
  if ((status != 0 && code == 0)); then
    code=$status
    stop # the others would wait for this one
  fi
done
exit "$code"

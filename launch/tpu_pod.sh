#!/usr/bin/env bash
# Every host of a TPU pod slice, from a machine with gcloud: launch/tpu_pod.sh --config stage --out /mnt/runs/stage
# The hosts hold this checkout in $FOLDER, set up there by `make setup EXTRAS=tpu`, and a mounted folder for
# the run that all of them see.
set -euo pipefail

TPU="${TPU:-packforcing}"
ZONE="${ZONE:-us-east5-a}"
FOLDER="${FOLDER:-packforcing-jax}"
PROGRAM="${PROGRAM:-.venv/bin/packforcing}"

everywhere() { gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$1"; }

signalled=""
trap 'signalled=yes' TERM INT # the hosts are told below: one of them alone would leave the others waiting

everywhere "cd $FOLDER && echo \$\$ > train.pid && exec $PROGRAM train --distributed $(printf '%q ' "$@")" </dev/null &
ssh=$!
code=0
wait "$ssh" || code=$?
if [[ -n "$signalled" ]]; then
  everywhere "kill -TERM \$(cat $FOLDER/train.pid)" || true
  code=0
  wait "$ssh" || code=$?
fi
exit "$code"

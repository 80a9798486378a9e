#!/usr/bin/env bash
# One process on one device: launch/single_gpu.sh train --config stage --out runs/stage
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PACKFORCING="${PACKFORCING:-.venv/bin/packforcing}"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"

exec "$PACKFORCING" "$@" # the program itself hears SIGTERM

#!/usr/bin/env bash
# One process on one device: launch/single_gpu.sh sample --out out/demo.mp4
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
exec "${PACKFORCING:-.venv/bin/packforcing}" "$@"

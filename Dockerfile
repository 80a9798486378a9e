# PackForcing for NVIDIA GPUs. The host needs NVIDIA's driver and its container toolkit; CUDA comes with jax.
#
#   docker build -t packforcing .
#   docker run --gpus all -v "$PWD/out:/app/out" packforcing sample --out out/video.mp4
#   docker build --build-arg EXTRAS= -t packforcing:cpu .      # without CUDA
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG EXTRAS=cuda13

# launch/jobset.yaml expects the checkout in /app and its environment in /app/.venv.
WORKDIR /app
COPY . .
RUN python -m venv .venv \
 && version=$(python -c 'import sys; print(*sys.version_info[:2], sep="")') \
 && .venv/bin/pip install --no-cache-dir --prefer-binary -c "constraints-py${version}.txt" ".${EXTRAS:+[$EXTRAS]}"

ENV PATH=/app/.venv/bin:$PATH
ENTRYPOINT ["packforcing"]
CMD ["--help"]

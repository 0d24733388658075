# syntax=docker/dockerfile:1.7
# The image of head, gateways and models. Two targets:
#
#   docker build --platform linux/amd64 --target gpu -t REGISTRY/serve-app:0.1.0 .
#   docker build --platform linux/amd64 --target cpu -t serve-app:0.1.0-cpu .      (kind, laptops)
#
# Ray and vLLM agree because both come from one lock with hashes (requirements/cuda.lock: Ray
# 2.60.0, vLLM 0.29.0, PyTorch 2.13 for CUDA 13). The CUDA libraries come with PyTorch's wheels,
# so the base is NVIDIA's small one, and adds only what kernels need that compile at run time.
# For an SBOM: docker buildx build --sbom=true; every package keeps its metadata in /opt/venv.

ARG CUDA_IMAGE=nvidia/cuda:13.0.3-base-ubuntu24.04
ARG CPU_IMAGE=python:3.11-slim-bookworm
ARG UV_IMAGE=ghcr.io/astral-sh/uv:0.13.9

# hadolint ignore=DL3006
FROM ${UV_IMAGE} AS uv

# ------------------------------------------------------------------ Python packages, for CUDA
# hadolint ignore=DL3006
FROM ${CUDA_IMAGE} AS gpu-packages
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3.12-venv \
 && rm -rf /var/lib/apt/lists/*
COPY --from=uv /uv /usr/local/bin/uv
ENV VIRTUAL_ENV=/opt/venv UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
RUN python3.12 -m venv --without-pip /opt/venv
# The lock alone: this layer, the 9 GB one, is made anew only when a version changes.
RUN --mount=type=cache,target=/root/.cache/uv \
    --mount=type=bind,source=requirements/cuda.lock,target=/tmp/cuda.lock \
    uv pip install --no-deps --require-hashes -r /tmp/cuda.lock

# ------------------------------------------------------------------ the GPU image
# hadolint ignore=DL3006
FROM ${CUDA_IMAGE} AS gpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# bash, wget, grep: KubeRay's probes. gcc, Python's headers: Triton compiles a launcher for each
# kernel. nvcc and CUDA's headers: FlashInfer and DeepGEMM compile for the GPU that they find.
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      bash ca-certificates grep procps wget \
      g++ gcc libc6-dev ninja-build python3.12 python3.12-dev \
      cuda-cudart-dev-13-0 cuda-nvcc-13-0 cuda-nvrtc-dev-13-0 libcurand-dev-13-0 \
 && rm -rf /var/lib/apt/lists/*
COPY --from=gpu-packages /opt/venv /opt/venv
# Ubuntu's own user has 1000, which the pods' securityContext and the file system expect.
# The links: a login shell, which KubeRay can be told to use, resets PATH. .cache: a volume mounted
# there gets its owner.
RUN userdel --remove ubuntu \
 && useradd --uid 1000 --create-home --shell /bin/bash app \
 && install -d -o app -g app /models /home/app/.cache \
 && ln -s /opt/venv/bin/ray /opt/venv/bin/serve /opt/venv/bin/serve-app /usr/local/bin/
ENV PATH=/opt/venv/bin:$PATH \
    CUDA_HOME=/usr/local/cuda \
    PYTHONUNBUFFERED=1 \
    VLLM_NO_USAGE_STATS=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    SERVE_APP_ACCESS_LOG=1
WORKDIR /home/app
# Our own code last: a change of it is a layer of a megabyte.
RUN --mount=type=bind,from=uv,source=/uv,target=/usr/local/bin/uv \
    --mount=type=bind,source=.,target=/src,rw \
    VIRTUAL_ENV=/opt/venv uv pip install --no-cache --no-deps /src \
 && rm -f /tmp/uv-*.lock
USER 1000:1000
EXPOSE 8000 8265 6379 8080
# For `docker run`; Kubernetes has its own probes.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30m \
  CMD ["wget", "--no-proxy", "-q", "-O", "/dev/null", "http://127.0.0.1:8000/-/healthz"]
CMD ["serve-app", "--help"]
LABEL org.opencontainers.image.title="serve_app" \
      org.opencontainers.image.description="Many LLMs behind one OpenAI endpoint: Ray 2.60.0, vLLM 0.29.0, CUDA 13" \
      org.opencontainers.image.version="0.1.0"

# ------------------------------------------------------------------ the GPU image with EFA
# For replicas over several machines with EFA: libfabric and NCCL's plugin for it, from AWS.
FROM gpu AS gpu-efa
ARG EFA_INSTALLER=1.44.0
USER 0:0
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /tmp/aws-efa-installer
RUN wget -qO- "https://efa-installer.amazonaws.com/aws-efa-installer-${EFA_INSTALLER}.tar.gz" \
    | tar xz --strip-components=1 \
 && apt-get update \
 && ./efa_installer.sh -y --skip-kmod --skip-limit-conf --no-verify \
 && rm -rf /tmp/aws-efa-installer/* /var/lib/apt/lists/*
WORKDIR /home/app
ENV LD_LIBRARY_PATH=/opt/amazon/efa/lib:/opt/amazon/ofi-nccl/lib/x86_64-linux-gnu:$LD_LIBRARY_PATH
USER 1000:1000

# ------------------------------------------------------------------ without a GPU
# hadolint ignore=DL3006
FROM ${CPU_IMAGE} AS cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# bash, wget, grep: KubeRay's probes. g++: torch.compile, which vLLM uses without enforce_eager.
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      bash ca-certificates g++ grep libgomp1 libnuma1 procps wget \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --create-home --shell /bin/bash app \
 && install -d -o app -g app /models /home/app/.cache /opt/venv \
 && python -m venv --without-pip /opt/venv \
 && ln -s /opt/venv/bin/ray /opt/venv/bin/serve /opt/venv/bin/serve-app /usr/local/bin/
ENV PATH=/opt/venv/bin:$PATH VIRTUAL_ENV=/opt/venv UV_LINK_MODE=copy PYTHONUNBUFFERED=1 \
    VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0 SERVE_APP_ACCESS_LOG=1
# As `make venv` does it: PyTorch's CPU build is on no package registry. Where only a registry is
# reached: --build-arg TORCH="--require-hashes -r /requirements/torch-registry.lock", 3 GB larger.
ARG TORCH="--index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu"
# hadolint ignore=SC2086
RUN --mount=type=bind,from=uv,source=/uv,target=/usr/local/bin/uv \
    --mount=type=cache,target=/root/.cache/uv \
    --mount=type=bind,source=requirements,target=/requirements \
    uv pip install --no-deps ${TORCH} \
 && uv pip install --no-deps --require-hashes -r /requirements/cpu.lock
WORKDIR /home/app
RUN --mount=type=bind,from=uv,source=/uv,target=/usr/local/bin/uv \
    --mount=type=bind,source=.,target=/src,rw \
    uv pip install --no-cache --no-deps /src/requirements/vllm-cpu-shim /src \
 && rm -f /tmp/uv-*.lock
USER 1000:1000
EXPOSE 8000 8265 6379 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=10m \
  CMD ["wget", "--no-proxy", "-q", "-O", "/dev/null", "http://127.0.0.1:8000/-/healthz"]
CMD ["serve-app", "--help"]
LABEL org.opencontainers.image.title="serve_app" \
      org.opencontainers.image.description="Many LLMs behind one OpenAI endpoint: Ray 2.60.0, vLLM 0.29.0, CPU" \
      org.opencontainers.image.version="0.1.0"

# The backend: service and worker. Without a GPU:
#   docker build -t ppal-backend:cpu .
# With CUDA 12.6, for GPUs of compute capability 7.5 to 9.0 and, compiled at their first use, newer ones:
#   docker build -t ppal-backend:gpu --build-arg FORCE_CUDA=1 \
#     --build-arg BASE=nvidia/cuda:12.6.3-devel-ubuntu24.04 --build-arg RUNTIME_BASE=nvidia/cuda:12.6.3-base-ubuntu24.04 \
#     --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cu126 .
# Toolkit (BASE) and torch (TORCH_INDEX_URL) must be of the same CUDA version; docs/gpu.md has the choices.
# With Ray in it (PPAL_ENGINE=ray), either of them: --build-arg RAY=1; with S3 (PPAL_ARTIFACTS=s3://…): --build-arg S3=1.
# With what mm_grounding_dino_t needs to read prompts: --build-arg GROUNDING=1.
# Where a wheel of mmcv lies ready (a folder or an index): --build-arg PPAL_WHEELS=…; docs/development.md.
ARG BASE=python:3.11-slim-bookworm
ARG RUNTIME_BASE=${BASE}

# What changes seldom: Python packages and compiled operators. Our code is not in it, but for its version.
FROM ${BASE} AS environment
ARG FORCE_CUDA=0
ARG TORCH_CUDA_ARCH_LIST=""
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG PPAL_WHEELS=""
ARG RAY=0
ARG S3=0
ARG GROUNDING=0
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PPAL_DEV=0 PPAL_CACHE=/tmp/ppal-cache
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential \
    && { command -v python3 >/dev/null || apt-get install -y --no-install-recommends python3-dev python3-venv; } \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/ppal
COPY pyproject.toml setup.py LICENSE requirements.txt requirements-ray.txt requirements-s3.txt requirements-grounding.txt ./
COPY scripts/setup.sh scripts/versions.env scripts/
COPY ppal_backend/__init__.py ppal_backend/__init__.py
# README's text is left out: it changes often, and the packages would be installed again each time.
RUN touch README.md \
    && scripts/setup.sh backend \
    && if [ "${RAY}" = 1 ]; then scripts/setup.sh ray; fi \
    && if [ "${S3}" = 1 ]; then scripts/setup.sh s3; fi \
    && if [ "${GROUNDING}" = 1 ]; then scripts/setup.sh grounding; fi \
    && rm -rf /tmp/ppal-cache build

FROM ${RUNTIME_BASE} AS runtime
ENV PATH=/opt/ppal/.venv/bin:$PATH PYTHONUNBUFFERED=1 MODEL_DIR=/data PPAL_CACHE=/data/cache
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN { command -v python3 >/dev/null \
      || { apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*; }; } \
    && useradd --create-home --uid 10001 ppal \
    && install -d -o ppal -g ppal /data
COPY --from=environment /opt/ppal /opt/ppal
COPY model_zoo /opt/ppal/model_zoo
COPY ppal_backend /opt/ppal/ppal_backend
# The user may not write here, and without bytecode every process would compile the code anew.
RUN python3 -m compileall -q --invalidation-mode unchecked-hash /opt/ppal/ppal_backend
# Where relative paths of commands lead: `ppal backup x.tar` writes into the volume.
WORKDIR /data
USER 10001
VOLUME /data
EXPOSE 9090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=3s --start-period=30s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9090/health', timeout=2)"]
CMD ["ppal", "up"]

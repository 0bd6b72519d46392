# The backend: service and worker. Without a GPU:
#   docker build -t ppal-backend:cpu .
# With CUDA (the toolkit of BASE must be of the same CUDA version as the torch of TORCH_INDEX_URL):
#   docker build -t ppal-backend:gpu --build-arg FORCE_CUDA=1 \
#     --build-arg BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04 --build-arg RUNTIME_BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 \
#     --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cu128 .
# With Ray in it (PPAL_ENGINE=ray), either of them: --build-arg RAY=1; with S3 (PPAL_ARTIFACTS=s3://…): --build-arg S3=1.
ARG BASE=python:3.11-slim-bookworm
ARG RUNTIME_BASE=${BASE}

FROM ${BASE} AS build
ARG FORCE_CUDA=0
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG RAY=0
ARG S3=0
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PPAL_DEV=0 PPAL_CACHE=/tmp/ppal-cache \
    FORCE_CUDA=${FORCE_CUDA} TORCH_INDEX_URL=${TORCH_INDEX_URL}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential libgl1 libglib2.0-0 python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/ppal
# First what the environment is made from: mmcv is not compiled again when only our code changes.
COPY pyproject.toml README.md LICENSE requirements.txt requirements-ray.txt requirements-s3.txt ./
COPY scripts/setup.sh scripts/versions.env scripts/
COPY ppal_backend/__init__.py ppal_backend/__init__.py
RUN scripts/setup.sh backend \
    && if [ "${RAY}" = 1 ]; then scripts/setup.sh ray; fi \
    && if [ "${S3}" = 1 ]; then scripts/setup.sh s3; fi \
    && rm -rf /tmp/ppal-cache \
    && find .venv -name __pycache__ -type d -prune -exec rm -rf {} +
COPY ppal_backend ppal_backend
COPY model_zoo model_zoo

FROM ${RUNTIME_BASE} AS runtime
ENV DEBIAN_FRONTEND=noninteractive PATH=/opt/ppal/.venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    MODEL_DIR=/data PPAL_CACHE=/data/cache
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 ppal \
    && install -d -o ppal -g ppal /data
COPY --from=build /opt/ppal /opt/ppal
WORKDIR /opt/ppal
USER 10001
VOLUME /data
EXPOSE 9090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=3s --start-period=30s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9090/health', timeout=2)"]
CMD ["ppal", "up"]

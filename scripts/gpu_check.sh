#!/usr/bin/env bash
# Figures on a GPU for docs/gpu.md: compiles mmcv's CUDA operators where they are missing, tests, then measures.
# Without a GPU or nvcc it says so and ends with 1 before anything is installed. Arguments go to benchmarks/gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "gpu-check: $*; nothing was done" >&2; exit 1; }
has_cuda_ops() {
    .venv/bin/python -c 'import sys; from mmcv.ops import get_compiling_cuda_version as v; sys.exit(v() == "not available")' \
        >/dev/null 2>&1
}

nvidia-smi -L 2>/dev/null | grep -q '^GPU ' || fail "expected an NVIDIA GPU, but nvidia-smi lists none; run this on a machine with one"
if ! has_cuda_ops; then
    command -v nvcc >/dev/null || fail "expected nvcc to compile mmcv's CUDA operators, found none; install the CUDA toolkit"
    # An environment made for a CPU counts as finished and has the same version of mmcv: both must go.
    if [ -x .venv/bin/python ]; then .venv/bin/python -m pip uninstall -q -y onedl-mmcv; rm -f .venv/.setup-stamp; fi
fi
FORCE_CUDA=1 scripts/setup.sh backend
tests=0
.venv/bin/python -m pytest -m gpu tests/detector/test_on_gpu.py || tests=$?
.venv/bin/python -m benchmarks.gpu "$@"
exit "$tests"

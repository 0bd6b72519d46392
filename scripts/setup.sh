#!/usr/bin/env bash
# Sets up the two virtual environments. The container image runs this same script.
#
#   scripts/setup.sh backend        .venv                the backend, its detector stack and its tests' tools
#   scripts/setup.sh label-studio   .venv-label-studio   Label Studio, whose pins are its own
#   scripts/setup.sh ray            .venv                Ray as well, for PPAL_ENGINE=ray
#   scripts/setup.sh s3             .venv                S3 as well, for PPAL_ARTIFACTS=s3://…
#   scripts/setup.sh grounding      .venv                what detectors need that read prompts, for mm_grounding_dino_t
#   scripts/setup.sh mmcv           .venv                mmcv alone, where the rest is in place
#   scripts/setup.sh                backend and label-studio
#
# A finished step leaves a stamp with a checksum of what it was made from; nothing is done twice.
# Environment: PYTHON (default python3.11 or python3), PPAL_CACHE (default ~/.cache/ppal: mmcv's compiled wheel),
# PPAL_WHEELS (a folder or an index that has mmcv's wheel ready; none: always compile; default: the forks' index),
# FORCE_CUDA=1 for mmcv's CUDA ops, TORCH_CUDA_ARCH_LIST for which GPUs, TORCH_INDEX_URL for another torch build,
# PPAL_DEV=0 to leave out the tools for tests.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck disable=SC1091
source scripts/versions.env
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
cache=${PPAL_CACHE:-$HOME/.cache/ppal}
dev=${PPAL_DEV:-1}

say() { printf '\033[1m[setup]\033[0m %s\n' "$*"; }

check_python() {
    "$python" - <<'PY' || { echo "setup: expected Python 3.11 or 3.12 with venv; set PYTHON=/path/to/python3.11" >&2; exit 1; }
import sys, venv, ensurepip
sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 12)))
PY
}

stamp() { cat "$@" scripts/setup.sh scripts/versions.env | sha256sum | cut -d' ' -f1; }
is_done() { [ -f "$1/.setup-stamp" ] && [ "$(cat "$1/.setup-stamp")" = "$2" ]; }

make_venv() { [ -x "$1/bin/python" ] || "$python" -m venv "$1"; "$1/bin/python" -m pip install -q --upgrade "pip==$PIP_VERSION"; }

# Where ready wheels of mmcv are looked for, one a line: a folder or an index. The forks publish an index for each
# version of torch and CUDA.
wheel_places() {
    case "${PPAL_WHEELS:-}" in
        none) ;;
        "") .venv/bin/python -c "import torch; v = torch.__version__.split('+')[0].replace('.', ''); c = torch.version.cuda
print(f'$MMCV_INDEX/' + (f'cu{c.replace(\".\", \"\")}' if c and '$1' == 'cuda' else 'cpu') + f'-torch{v}')" ;;
        *) printf '%s\n' "$PPAL_WHEELS" ;;
    esac
}

# Puts a ready wheel into folder $2 for operators of kind $1 (cpu or cuda), if a place has one that works.
ready_wheel() {
    local place found from
    found=$(mktemp -d)
    while read -r place; do
        [ -n "$place" ] || continue
        if [ -d "$place" ]; then
            # Also in a folder below it that is named as ours are.
            from=(--no-index --find-links "$place" --find-links "$place/$(basename "$2")")
        else
            from=(--index-url "$place" --retries 0 --timeout 5)
        fi
        say "looking for a ready wheel of mmcv $MMCV_VERSION in $place"
        .venv/bin/python -m pip download -q --no-deps --only-binary :all: --no-cache-dir "${from[@]}" -d "$found" \
            "onedl-mmcv==$MMCV_VERSION" >"$found/log" 2>&1 || continue
        # A wheel for another torch installs and then does not import.
        if .venv/bin/python -m pip install -q --no-deps --force-reinstall "$found"/*.whl && mmcv_works "$1" 2>"$found/log"; then
            mkdir -p "$2"; mv "$found"/*.whl "$2"/; rm -rf "$found"; return 0
        fi
        say "the wheel from there does not work with this torch: $(tail -n 1 "$found/log")"
        .venv/bin/python -m pip uninstall -q -y onedl-mmcv || true
        rm -f "$found"/*.whl
    done < <(wheel_places "$1")
    rm -rf "$found"
    return 1
}

# Whether the installed operators load with the installed torch; the packages that the rest of mmcv needs come later.
mmcv_works() {
    .venv/bin/python - "$1" <<'PY'
import importlib.util, sys, sysconfig, torch
from pathlib import Path
found = sorted(Path(sysconfig.get_path("purelib")).glob("mmcv/_ext*.so"))
assert found, "it holds no compiled operators"
spec = importlib.util.spec_from_file_location("_ext", found[0])
operators = importlib.util.module_from_spec(spec)
spec.loader.exec_module(operators)
assert sys.argv[1] == "cpu" or operators.get_compiling_cuda_version() != "not available", "they were compiled without CUDA"
PY
}

# mmcv's operators are compiled against the installed torch, which takes minutes: a ready wheel is taken where there is
# one, and what was compiled is kept outside the checkout.
install_mmcv() {
    local pip=(.venv/bin/python -m pip) key wheels
    local cuda=cpu
    if [ "${FORCE_CUDA:-0}" = 1 ] || { command -v nvcc >/dev/null && .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }; then
        cuda=cuda; export FORCE_CUDA=1
        # Without a GPU in sight, as in an image's build, torch cannot choose for which ones to compile.
        [ -n "${TORCH_CUDA_ARCH_LIST:-}" ] || .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
            export TORCH_CUDA_ARCH_LIST=$CUDA_ARCHITECTURES
    fi
    key=$(.venv/bin/python -c "import sys, platform, torch; print('py%d%d-torch%s-mmcv$MMCV_VERSION-$cuda-%s' % (*sys.version_info[:2], torch.__version__, platform.machine()))")
    wheels=$cache/wheels/$key
    if ! compgen -G "$wheels/onedl_mmcv-$MMCV_VERSION-*.whl" >/dev/null && ! ready_wheel "$cuda" "$wheels"; then
        command -v gcc >/dev/null && command -v g++ >/dev/null || {
            echo "setup: expected gcc and g++ to compile mmcv, or a ready wheel in PPAL_WHEELS, got neither (Debian: apt-get install build-essential)" >&2; exit 1; }
        say "compiling mmcv's $cuda ops once (7 to 15 minutes on 2 cores); the wheel is kept in $wheels"
        mkdir -p "$wheels"
        local build log; build=$(mktemp -d "$wheels/.build.XXXXXX"); log=$wheels/build.log
        MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} "${pip[@]}" wheel -q --no-build-isolation --no-deps \
            "onedl-mmcv==$MMCV_VERSION" -w "$build" >"$log" 2>&1 &
        local job=$! waited=0
        while kill -0 "$job" 2>/dev/null; do
            sleep 5; waited=$((waited + 5)); [ $((waited % 60)) = 0 ] && say "… mmcv: $((waited / 60)) min"
        done
        wait "$job" || { tail -n 30 "$log" >&2; echo "setup: mmcv did not compile; the whole log is $log" >&2; exit 1; }
        mv "$build"/*.whl "$wheels"/; rmdir "$build"
    fi
    "${pip[@]}" install -q --no-deps "$wheels"/onedl_mmcv-"$MMCV_VERSION"-*.whl
}

backend() {
    local files=(requirements.txt pyproject.toml); [ "$dev" = 1 ] && files+=(requirements-dev.txt)
    local want; want=$(stamp "${files[@]}")
    is_done .venv "$want" && return
    say "backend environment .venv: packages"
    make_venv .venv
    local pip=(.venv/bin/python -m pip install -q)
    # mmcv's build needs pkg_resources, which newer setuptools no longer bring.
    "${pip[@]}" --no-deps "setuptools==$SETUPTOOLS_VERSION" "wheel==$WHEEL_VERSION" "ninja==$NINJA_VERSION"
    "${pip[@]}" --no-deps -r requirements.txt
    # After them: torch finds what it needs in the tested versions. NVIDIA's libraries come as torch itself names them.
    say "backend environment .venv: torch $TORCH_VERSION"
    "${pip[@]}" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} -c requirements.txt "torch==$TORCH_VERSION"
    install_mmcv
    # mmdetection comes as source and looks for torch while it builds; label-studio-ml 1.0.9 pins a Flask of 2020
    # with known holes, so both come without their own pins. requirements.txt holds what they import.
    "${pip[@]}" --no-deps --no-build-isolation "onedl-mmdetection==$MMDET_VERSION" "label-studio-ml==$LABEL_STUDIO_ML_VERSION"
    [ "$dev" = 1 ] && "${pip[@]}" --no-deps -r requirements-dev.txt
    "${pip[@]}" --no-deps --no-build-isolation -e .
    echo "$want" >.venv/.setup-stamp
}

label_studio() {
    local want; want=$(stamp requirements-label-studio.txt)
    is_done .venv-label-studio "$want" && return
    say "Label Studio environment .venv-label-studio: label-studio $LABEL_STUDIO_VERSION"
    make_venv .venv-label-studio
    # Five of them come as source; without isolation they are built with these and fetch nothing themselves.
    .venv-label-studio/bin/python -m pip install -q --no-deps "setuptools==$SETUPTOOLS_VERSION" "wheel==$WHEEL_VERSION"
    .venv-label-studio/bin/python -m pip install -q --no-deps --no-build-isolation -r requirements-label-studio.txt
    echo "$want" >.venv-label-studio/.setup-stamp
}

check_python
case "${1:-all}" in
    backend) backend ;;
    mmcv) install_mmcv ;;
    ray) backend; .venv/bin/python -m pip install -q --no-deps -r requirements-ray.txt ;;
    s3) backend; .venv/bin/python -m pip install -q --no-deps -r requirements-s3.txt ;;
    grounding) backend; .venv/bin/python -m pip install -q --no-deps -r requirements-grounding.txt ;;
    label-studio) label_studio ;;
    all) # Label Studio's packages are fetched while mmcv compiles.
        label_studio & job=$!
        trap 'kill "$job" 2>/dev/null || true' EXIT
        backend
        wait "$job" ;;
    *) echo "setup: expected 'backend', 'mmcv', 'ray', 's3', 'grounding', 'label-studio' or nothing, got '$1'" >&2; exit 2 ;;
esac

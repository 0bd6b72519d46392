#!/usr/bin/env bash
# Writes a bill of materials (CycloneDX) of both environments to build/, and looks every exact version up in PyPI's
# vulnerability service. Fails when a version is known to be vulnerable, and also when one could not be looked up.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck disable=SC1091
source scripts/versions.env
bin=.venv/bin
mkdir -p build
failed=0

audit() { # name, file of exact versions
    "$bin/cyclonedx-py" requirements "$2" --no-validate --output-format JSON -o "build/sbom-$1.json"
    echo "audit: wrote build/sbom-$1.json ($(grep -c '==' "$2") packages)"
    local log="build/audit-$1.log"
    if "$bin/pip-audit" --strict --disable-pip --no-deps --progress-spinner off -r "$2" >"$log" 2>&1; then
        echo "audit: $1: no known vulnerability"
    else
        tail -n 15 "$log" >&2
        if grep -q 'could not be audited\|ConnectionError\|ServiceError\|HTTPError' "$log"; then
            echo "audit: $1: NOT AUDITED, the vulnerability service did not answer for every package; run this where" \
                "pypi.org can be reached (whole log: $log)" >&2
        else
            echo "audit: $1: see above; raise the versions named there (whole log: $log)" >&2
        fi
        failed=1
    fi
}

pinned=$(mktemp)
trap 'rm -f "$pinned"' EXIT
{
    cat requirements.txt
    printf '%s\n' "torch==$TORCH_VERSION" "onedl-mmcv==$MMCV_VERSION" "onedl-mmdetection==$MMDET_VERSION" \
        "label-studio-ml==$LABEL_STUDIO_ML_VERSION"
} >"$pinned"
audit backend "$pinned"
audit label-studio requirements-label-studio.txt
exit "$failed"

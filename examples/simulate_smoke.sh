#!/usr/bin/env bash
# Active learning replayed on generated data with known boxes: three strategies, two queries, one seed.
#
#   examples/simulate_smoke.sh [FOLDER]
#
# Far too small to compare strategies; it shows what a simulation needs and leaves. A second run goes on where the
# first was stopped.
set -euo pipefail
out=${1:-simulate-smoke}

ppal simulate --preset smoke --max-iterations "${MAX_ITERATIONS:-60}" --out "$out"

# The same report again, and its figures for a script.
ppal report "$out" --json >"$out/answer.json"
python3 - "$out/answer.json" <<'PY'
import json, sys
answer = json.load(open(sys.argv[1]))
print(answer["report"])
for name, area in answer["summary"]["aulc"].items():
    print(f"{name}: area under the learning curve {area}")
PY

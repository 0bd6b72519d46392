"""Half an hour of work and faults on a real Label Studio; see ``tests/soak/run.py`` and docs/reliability.md.

python scripts/soak.py --minutes 30 --seed 0 --out soak-run
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.soak.run import run


def main() -> int:
    """Run it; 0 when every check held."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0, help="what strikes when")
    parser.add_argument("--out", type=Path, default=Path("soak-run"), help="emptied first")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped then too
    report = run(options.out, options.minutes, options.seed, lambda text: print(text, flush=True))
    for part, found in report["checks"].items():
        for check in found:
            print(f"{'ok ' if check['ok'] else 'NOT'} {part}: {check['what']} {check.get('found', '')}")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())

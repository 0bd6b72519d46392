"""A short soak: every fault may strike, and all that must hold at the end holds. The long one: ``scripts/soak.py``."""

import pytest

from tests.soak.checks import _differ
from tests.soak.run import run

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.e2e]


def test_two_minutes_of_faults_end_whole(tmp_path):
    report = run(tmp_path / "soak", minutes=2.0, seed=7, pause_s=(1.0, 3.0), rest_s=(4.0, 8.0))
    failed = {part: [c for c in found if not c["ok"]] for part, found in report["checks"].items()}
    assert report["ok"], {part: found for part, found in failed.items() if found}
    assert all(a["submitted"] > 10 for a in report["annotators"]) and sum(report["faults"].values()) > 4
    assert all(rounds["trainings"] >= 1 for rounds in report["rounds"].values())


def test_what_differs_is_named():
    assert _differ({1, 2, 3}, {2, 4}) == {"missing": [1, 3], "too many": [4]}

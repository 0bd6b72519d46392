"""What ``make bench`` starts, and what it prints and returns."""

import json
import subprocess
from pathlib import Path

import pytest

import benchmarks
from benchmarks import __main__ as bench

FOLDER = Path(benchmarks.__file__).parent


@pytest.fixture
def ran(monkeypatch):
    ran = []

    def process(command, **options):
        module, words = command[2], command[3:]
        ran.append((module.removeprefix("benchmarks."), *words))
        if "--quick" in words:
            raise subprocess.CalledProcessError(7, command)
        told = json.dumps({"of": ran[-1]}) if options["stdout"] else None
        return subprocess.CompletedProcess(command, 0, told)

    monkeypatch.setattr("benchmarks.__main__.subprocess.run", process)
    return ran


@pytest.mark.parametrize("words", [["--json"], ["all", "--json"]])
def test_all_print_one_document_together(ran, capsys, words):
    assert bench.main(words) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {"service", "acquisition", "detector", "dashboard", "interactive", "load"}
    assert answer["service"] == {"idle": {"of": ["service"]}, "training": {"of": ["service", "--load"]}}
    assert answer["acquisition"] == {"of": ["acquisition", "--json"]}


def test_without_a_name_all_run_and_the_first_exit_code_that_is_not_0_is_handed_on(ran, capsys):
    assert bench.main([]) == 0
    assert ran == [("acquisition",), ("service",), ("service", "--load"), ("detector",), ("dashboard",),
                   ("interactive",), ("load",)]  # fmt: skip
    assert bench.main(["detector", "--quick"]) == 7
    ran.clear()
    assert bench.main(["gpu", "--device", "cpu"]) == 0 and ran == [("gpu", "--device", "cpu")]
    assert bench.main(["none"]) == 2 and "expected one of all, acquisition" in capsys.readouterr().err


def test_every_name_is_a_module_and_is_listed(capsys):
    assert bench.main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name in bench.NAMES:
        assert (FOLDER / f"{name}.py").is_file() and f"  {name} " in listed

"""What errors tell people to do can be done: what texts name exists, and advice is followed once where it can be."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from ppal_backend.acquisition.strategies import get_strategy
from ppal_backend.detector.heads import training_family
from ppal_backend.detector.train.request import TrainRequest
from ppal_backend.detector.weights.initial import starts_random
from ppal_backend.detector.zoo import Schedule, Weights, ZooEntry
from ppal_backend.detector.zoo.fetch import weights_file, weights_target
from ppal_backend.engines.local import _start
from ppal_backend.errors import PPALError
from ppal_backend.rounds.folder import need_space
from ppal_backend.service.auth import is_on
from ppal_backend.settings import ProjectOptions, Settings, load_settings, variables
from ppal_backend.simulation.variants import parse_variants
from tests.acquisition.pools import context
from tests.test_docs import KNOWN, NOT_SETTINGS

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "ppal_backend").rglob("*.py"))
VARIABLES = {variable for field in Settings.model_fields for variable in variables(field)} | NOT_SETTINGS
OPTIONS = set().union(*KNOWN.values()) | {"--help"}
OF_OTHERS = {"--address", "--no-deps", "--load"}  # of ray, pip and a benchmark
OF_LABEL_STUDIO = re.compile(r"LABEL_STUDIO_(?!URL|PUBLIC_URL|API_KEY)")


def texts(path):
    """Every text of a file but docstrings; what is filled in shows as {}."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    left_out = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            left_out.update(map(id, node.values))
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
            yield node.value


TEXTS = [(path, text) for path in FILES for text in texts(path)]


def named(pattern, *rooms):
    """Matches of a pattern in all texts, or in those of some rooms."""
    for path, text in TEXTS:
        if not rooms or path.relative_to(ROOT / "ppal_backend").parts[0] in rooms:
            for found in re.finditer(pattern, text):
                yield path.name, found


def test_commands_in_texts_exist():
    found = list(named(r"\bppal ([a-z][a-z-]*)(?: ([a-z][a-z-]*))?"))
    assert len(found) > 30
    for file, words in found:
        assert words[1] in KNOWN or f"{words[1]} {words[2]}" in KNOWN, f"{file}: {words[0]!r} is no command"


def test_options_in_texts_exist():
    for file, option in named(r"(?<![\w-])--[a-z][a-z-]+", "commands", "operations", "simulation", "doctor"):
        assert option[0] in OPTIONS | OF_OTHERS, f"{file}: no command takes {option[0]}"


def test_variables_in_texts_exist():
    pattern = r"\b(PPAL_[A-Z_]*[A-Z]|LABEL_STUDIO_[A-Z_]*[A-Z]|BASIC_AUTH_[A-Z]+|START_TRAINING_[A-Z_]+)\b"
    found = [(file, name[0]) for file, name in named(pattern) if not OF_LABEL_STUDIO.match(name[0])]
    assert len(found) > 30
    for file, name in found:
        assert name in VARIABLES, f"{file}: {name} is no setting"


def test_packages_and_pages_in_texts_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {extra[1] for _, extra in named(r"ppal-backend\[(\w+)\]")} <= set(extras)
    for file, page in named(r"\bdocs/[\w.-]+\.md"):
        assert (ROOT / page[0]).is_file(), f"{file}: there is no {page[0]}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"setup"} <= {target[1] for _, target in named(r"\brun make ([a-z-]+)")} <= targets


def test_extra_parameters_in_texts_are_taken():
    """As ``name: value``, the way people write them."""
    names = "|".join(ProjectOptions.model_fields)
    found = [(file, pair) for file, pair in named(rf"\b({names}): (false|true|random|zoo|last)\b")]
    assert {pair[1] for _, pair in found} >= {"init_weights", "difficulty"}
    for _, pair in found:
        value = {"false": False, "true": True}.get(pair[2], pair[2])
        assert getattr(load_settings().project_options({pair[1]: value}), pair[1]) == value
    assert not list(named(r"init_weights with")), "no path is taken there"


def test_values_of_variables_in_texts_are_taken(monkeypatch):
    pairs = [pair for _, pair in named(r"\b((?:PPAL_)?[A-Z_]+)=([a-z]+)\b")]
    found = {pair[1]: pair[2] for pair in pairs if pair[1] in VARIABLES}
    assert {"PPAL_DIFFICULTY", "PPAL_INIT_WEIGHTS", "DEVICE", "PPAL_ENGINE"} <= found.keys()
    for name, value in found.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            load_settings()


def refusal(call, *arguments, **named_arguments):
    with pytest.raises((PPALError, ValueError)) as raised:
        call(*arguments, **named_arguments)
    return str(raised.value)


def entry(tmp_path, weights):
    return ZooEntry("toy", "t", "p", tmp_path / "c.py", "anchor", (64, 64), weights, Schedule(1, 1, 1, 1, 0.1))


def as_a_training(options):
    """The initial weights that a round with these options asks its training for."""
    from dataclasses import replace

    from tests.rounds.fakes import SPEC

    return TrainRequest("toy", ("a",), Path("t.json"), None, Path("w"), init_weights=_start(replace(SPEC, **options)))


def test_a_detector_without_weights_starts_at_random_when_told(tmp_path):
    toy = entry(tmp_path, None)
    assert "init_weights: random" in refusal(weights_file, toy)
    options = load_settings().project_options({"init_weights": "random"})
    assert starts_random(as_a_training({"init_weights": options.init_weights}), toy)
    assert not starts_random(as_a_training({"init_weights": "zoo"}), toy)


def test_weights_put_where_the_message_says_are_used(tmp_path):
    toy = entry(tmp_path, Weights("detector", None, "http://127.0.0.1:9/none.pth", "", "MIT", "nowhere"))
    told = refusal(weights_file, toy, tmp_path)
    place = Path(re.search(r"put it at (\S+),", told)[1])
    assert place == weights_target(toy, tmp_path)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(b"weights")
    assert weights_file(toy, tmp_path) == place


def test_a_head_without_a_probe_trains_without_difficulty():
    import torch

    assert "difficulty: false" in refusal(training_family, torch.nn.Linear(1, 1))
    assert load_settings().project_options({"difficulty": False}).difficulty is False


def test_a_full_disk_has_a_limit_that_can_be_set(tmp_path, monkeypatch):
    assert "set PPAL_MIN_FREE_GIB" in refusal(need_space, tmp_path, 1e9)
    monkeypatch.setenv("PPAL_MIN_FREE_GIB", "0")
    need_space(tmp_path, load_settings().min_free_gib)


def test_half_of_the_credentials_and_both(monkeypatch):
    monkeypatch.setenv("BASIC_AUTH_USER", "me")
    monkeypatch.delenv("BASIC_AUTH_PASS", raising=False)
    assert refusal(is_on, load_settings()).endswith("set both")
    monkeypatch.setenv("BASIC_AUTH_PASS", "word")
    assert is_on(load_settings())


def test_the_settings_file_is_corrected_as_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PPAL_CONFIG", "gone.toml")
    assert "correct or unset it" in refusal(load_settings)
    monkeypatch.delenv("PPAL_CONFIG")
    (tmp_path / "ppal.toml").write_text('basic_auth_pass = "word"\n')
    variable = re.search(r"take it out and set (\w+) in", refusal(load_settings))[1]
    (tmp_path / "ppal.toml").write_text("")
    monkeypatch.setenv(variable, "word")
    assert load_settings().basic_auth_pass.get_secret_value() == "word"
    example = re.search(r"such as (http://\S+)", refusal(load_settings, LABEL_STUDIO_URL="ls.local"))[1]
    assert load_settings(LABEL_STUDIO_URL=example).label_studio_url == example


def test_options_of_strategies_are_written_as_told():
    told = refusal(parse_variants, "ppal:delta")
    example = re.search(r"write (\S+):option=value", told)[1]
    assert parse_variants(f"{example}:delta=2")[0].options == {"delta": 2}
    such_as = re.search(r"such as (\S+)$", refusal(parse_variants, ""))[1]
    assert [variant.name for variant in parse_variants(such_as)] == ["ppal", "random"]


def test_fasterpam_is_left_as_told():
    import numpy as np

    query = lambda **options: get_strategy("ppal+labelled", **options).query(context(1), 4, np.random.default_rng(0))  # noqa: E731
    told = refusal(query, refine="fasterpam")
    assert len(query(refine=re.search(r"use refine='(\w+)'", told)[1]).image_ids) == 4
    assert re.search(r"the strategy '(\S+)'", told)[1] == "ppal"
    pytest.importorskip("kmedoids")
    assert len(get_strategy("ppal", refine="fasterpam").query(context(1), 4, np.random.default_rng(0)).image_ids) == 4


@pytest.fixture
def store(store):
    store.projects.connect(7, "7.1", "<View/>", "http://ls.test", {})
    return store


def advised(text):
    """The commands that a text names, in its order."""
    return re.findall(r"ppal ((?:round|resume|cancel|prune|migrate)(?: \d+)?(?: --rank)?)", text)


def test_commands_that_messages_name_do_what_they_say(run, store):
    told = run("export-model", "7", "--out", "m").stderr
    assert advised(told) == ["round 7"] and run(*advised(told)[0].split()).exit_code == 0
    assert store.rounds.is_open(7)
    run("pause", "7")
    (problem,) = store.projects.get(7).problems.values()
    assert advised(problem) == ["resume 7"] and run(*advised(problem)[0].split()).exit_code == 0
    assert not store.projects.get(7).problems
    assert advised(refusal(need_space, Path.cwd(), 1e9)) == ["prune"] and run("prune").exit_code == 0
    assert run("cancel", "7").exit_code == 0 and not store.rounds.is_open(7)


def test_a_backup_and_its_restore_go_on_as_told(run, store):
    assert run("backup", "b.tar").exit_code == 0
    assert "choose another name" in run("backup", "b.tar").stderr and run("backup", "c.tar").exit_code == 0
    store.close()
    told = run("restore", "b.tar").stderr
    assert "use --force to move them aside" in told and run("restore", "b.tar", "--force").exit_code == 0


def test_several_simulations_want_out_as_told(run):
    assert "expected --out with several simulations" in run("report", "a", "b").stderr
    assert "run ppal simulate first" in run("report", "a", "b", "--out", "c").stderr

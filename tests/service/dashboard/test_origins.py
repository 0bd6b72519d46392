"""Where settings come from; and that no secret is among what is shown."""

import pytest

from ppal_backend.service.dashboard.origins import in_force, operator_settings, project_options
from ppal_backend.settings import ProjectOptions, load_settings

SECRETS = {
    "LABEL_STUDIO_API_KEY": "api-key-1234",
    "BASIC_AUTH_PASS": "basic-pass-1234",
    "PPAL_QUEUE_URL": "redis://:queue-pass-1234@host:6379/0",
    "PPAL_DATABASE_URL": "postgresql://ppal:db-pass-1234@host/name",
}


@pytest.fixture
def settings(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BASIC_AUTH_USER", "op")
    monkeypatch.setenv("START_TRAINING_EACH_N_UPDATES", "25")
    monkeypatch.setenv("PPAL_DELTA", "3")
    monkeypatch.delenv("LABEL_STUDIO_URL", raising=False)
    return load_settings()


def test_a_projects_own_choice_goes_before_the_environment_and_that_before_the_default(settings):
    shown = {s.name: (s.value, s.origin) for s in project_options(settings, {"delta": 5.0, "from_name": "boxes"})}
    assert shown["delta"] == ("5.0", "project's extra parameters")
    assert shown["from_name"] == ("boxes", "project's extra parameters")
    assert shown["budget"] == ("25", "environment (START_TRAINING_EACH_N_UPDATES or PPAL_BUDGET)")
    assert shown["strategy"] == ("auto", "default") and list(shown) == list(ProjectOptions.model_fields)
    plain = {s.name: (s.value, s.origin) for s in project_options(settings, {})}
    assert plain["delta"] == ("3.0", "environment (PPAL_DELTA)")


def test_operator_settings_are_all_there_without_a_secret(settings):
    rows = operator_settings(settings)
    shown = {s.name: (s.value, s.origin) for s in rows}
    assert shown["BASIC_AUTH_USER"] == ("op", "environment") and shown["PPAL_PORT"] == ("9090", "default")
    assert shown["LABEL_STUDIO_API_KEY"] == ("••• (set)", "environment")
    assert shown["PPAL_DATABASE_URL"][0] == "postgresql://ppal:•••@host/name"
    assert shown["LABEL_STUDIO_URL, LABEL_STUDIO_HOST"] == ("not set", "default")
    text = str(rows)
    assert "1234" not in text, "a secret is shown"


def test_an_unset_secret_is_told_as_not_set(monkeypatch):
    monkeypatch.delenv("LABEL_STUDIO_API_KEY", raising=False)
    assert {s.name: s.value for s in operator_settings(load_settings())}["LABEL_STUDIO_API_KEY"] == "not set"


def test_what_the_file_sets_is_told_as_such(settings, monkeypatch, tmp_path):
    (tmp_path / "ppal.toml").write_text("delta = 2.0\nseed = 7\nport = 9191\n")
    monkeypatch.chdir(tmp_path)
    read = load_settings()
    shown = {s.name: (s.value, s.origin) for s in project_options(read, {"strategy": "random"})}
    assert shown["seed"] == ("7", "ppal.toml") and shown["strategy"][1] == "project's extra parameters"
    assert shown["delta"] == ("3.0", "environment (PPAL_DELTA)") and shown["budget"][0] == "25"
    operator = {s.name: (s.value, s.origin) for s in operator_settings(read)}
    assert operator["PPAL_PORT"] == ("9191", "ppal.toml") and operator["PPAL_HOST"][1] == "default"


@pytest.mark.parametrize(
    ("candidates", "pool", "said"),
    [
        (
            48,
            78,
            "would be 400 images to choose from; in round 5 it was 48 of the pool's 78 images: images that measure",
        ),
        (78, 78, "delta 8 × budget 50 would be 400 images to choose from; in round 5 it was the whole pool of 78"),
        (400, 9000, None),
        (None, 78, None),
        (0, 0, None),
    ],
)
def test_what_a_small_pool_makes_of_delta_is_said(candidates, pool, said):
    options = ProjectOptions(delta=8.0, budget=50)
    found = in_force(options, {"candidates": candidates, "pool_images": pool, "round": 5})
    assert found == [] if said is None else len(found) == 1 and said in found[0]


def test_before_a_round_nothing_is_capped():
    assert in_force(ProjectOptions(), {}) == []

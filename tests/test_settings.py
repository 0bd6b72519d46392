"""What the environment and extra parameters may say."""

import pytest
from pydantic import SecretStr

from ppal_backend.errors import SettingsError
from ppal_backend.settings import load_settings


def test_the_variables_of_the_ecosystem_are_read(monkeypatch, tmp_path):
    values = {
        "LABEL_STUDIO_URL": "http://ls:8080/",
        "LABEL_STUDIO_API_KEY": "k",
        "MODEL_DIR": str(tmp_path),
        "START_TRAINING_EACH_N_UPDATES": "7",
        "SCORE_THRESHOLD": "0.4",
        "PPAL_DETECTOR": "retinanet_r50_fpn",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    options = settings.project_options()
    assert settings.label_studio_url == "http://ls:8080" and settings.model_dir == tmp_path
    assert (options.budget, options.score_threshold, options.detector) == (7, 0.4, "retinanet_r50_fpn")
    assert "k" not in repr(settings.label_studio_api_key)


def test_a_project_overrides_the_operator_where_it_may(tmp_path):
    settings = load_settings(MODEL_DIR=tmp_path, START_TRAINING_EACH_N_UPDATES=7)
    assert settings.project_options({"budget": 3}).budget == 3
    assert settings.project_options({}).budget == 7


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"bugdet": 3}, "'bugdet' is unknown (known: detector, budget"),
        ({"budget": 0}, "budget"),
        ({"delta": 1.0}, "delta"),
        ({"detector": "../../etc/passwd"}, "detector"),
        ({"init_weights": "/tmp/evil.pth"}, "init_weights"),
    ],
)
def test_wrong_extra_parameters_are_named(tmp_path, extra, told):
    with pytest.raises(SettingsError) as raised:
        load_settings(MODEL_DIR=tmp_path).project_options(extra)
    assert told in str(raised.value)


def test_hosts_are_split_and_trimmed(tmp_path):
    settings = load_settings(MODEL_DIR=tmp_path, allowed_image_hosts=" Images.example.com, cdn.example.com ,")
    assert settings.image_hosts == {"images.example.com", "cdn.example.com"}


def test_secrets_are_all_that_must_not_be_shown(monkeypatch):
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "token-1")
    monkeypatch.setenv("BASIC_AUTH_PASS", "word-2")
    settings = load_settings(
        database_url="postgresql+psycopg://ppal:word-3@db.local/ppal", queue_url=SecretStr("redis://:word-4@redis/0")
    )
    assert set(settings.secrets) == {"token-1", "word-2", "word-3", "redis://:word-4@redis/0", "word-4"}
    assert load_settings(LABEL_STUDIO_API_KEY="", BASIC_AUTH_PASS="").secrets == ()


def test_options_of_trainings_come_from_the_environment_and_the_project(monkeypatch, tmp_path):
    values = {"PPAL_DIFFICULTY": "false", "PPAL_INIT_WEIGHTS": "last", "PPAL_PATIENCE": "2", "PPAL_GPUS": "4"}
    for name, value in {**values, "PPAL_TRACKING": "mlflow", "PPAL_DETERMINISTIC": "true"}.items():
        monkeypatch.setenv(name, value)
    settings = load_settings(MODEL_DIR=tmp_path)
    assert (settings.gpus, settings.tracking) == (4, "mlflow")
    options = settings.project_options({"patience": 3})
    assert (options.difficulty, options.init_weights, options.patience) == (False, "last", 3)
    assert options.deterministic and settings.project_options({"difficulty": True}).difficulty
    with pytest.raises(SettingsError, match="tracking"):
        load_settings(MODEL_DIR=tmp_path, tracking="wandb")


@pytest.mark.parametrize("name", ["LABEL_STUDIO_URL", "public_url"])
def test_an_address_with_credentials_is_refused_without_showing_them(name):
    with pytest.raises(SettingsError, match="without credentials") as caught:
        load_settings(**{name: "http://me:word-5@ls.local:8080"})
    assert "word-5" not in str(caught.value) and "ls.local" in str(caught.value)

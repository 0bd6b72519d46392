"""What the environment and extra parameters may say."""

import os
import re
from pathlib import Path

import pytest
from pydantic import SecretStr

from ppal_backend.errors import SettingsError
from ppal_backend.settings import ProjectOptions, Settings, load_settings, passwords_in

ROOT = Path(__file__).parent.parent


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


OUT_OF_RANGE = [
    ("PPAL_DELTA", "0.5", "greater than 1"),
    ("PPAL_DELTA", "nan", "finite"),
    ("START_TRAINING_EACH_N_UPDATES", "0", "greater than or equal to 1"),
    ("PPAL_BUDGET", "100001", "less than or equal to 100000"),
    ("SCORE_THRESHOLD", "7", "less than or equal to 1"),
    ("PPAL_SCORE_THRESHOLD", "-1", "greater than or equal to 0"),
    ("PPAL_HOLDOUT_FRACTION", "0.9", "less than or equal to 0.5"),
    ("PPAL_MAX_ITERATIONS", "0", "greater than or equal to 1"),
    ("PPAL_PATIENCE", "0", "greater than or equal to 1"),
    ("PPAL_SEED", "-1", "greater than or equal to 0"),
    ("PPAL_DETECTOR", "../../etc/passwd", "match pattern"),
    ("PPAL_STRATEGY", "x" * 65, "at most 64"),
    ("PPAL_INIT_WEIGHTS", "/tmp/evil.pth", "'zoo', 'last' or 'random'"),
    ("PPAL_EMBEDDING", "cls_tower", "'query' or 'sampled'"),
    ("PPAL_COLD_START", "first", "'typical' or 'random'"),
    ("PPAL_POLL_INTERVAL_S", "0", "greater than or equal to 1"),
    ("LOG_LEVEL", "LOUD", "match pattern"),
    ("DEVICE", "gpu", "match pattern"),
]  # fmt: skip


@pytest.mark.parametrize(("variable", "value", "told"), OUT_OF_RANGE)
def test_a_variable_out_of_range_is_refused_at_the_start_by_its_own_name(monkeypatch, tmp_path, variable, value, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as raised:
        load_settings()
    text = str(raised.value)
    assert f"{variable} (" in text and told in text and "extra parameters" not in text
    assert f"got '{value[:80]}'" in text


def test_the_file_has_the_bounds_of_the_environment_and_its_own_names(toml):
    for name, value in (("delta", 0.5), ("budget", 0), ("score_threshold", 7)):
        toml(f"{name} = {value}\n")
        with pytest.raises(SettingsError) as raised:
            load_settings()
        text = str(raised.value)
        assert f": {name}: " in text and "ppal.toml" in text and "START_TRAINING" not in text


def test_what_a_project_may_choose_has_one_default_and_one_bound():
    """Field by field: no second copy that may drift away."""
    for name, field in ProjectOptions.model_fields.items():
        if name in Settings.model_fields:
            mine = Settings.model_fields[name]
            assert (mine.annotation, mine.default) == (field.annotation, field.default), name
            assert list(map(repr, mine.metadata)) == list(map(repr, field.metadata)), name


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


@pytest.mark.parametrize(
    ("address", "secrets"),
    [
        ("postgresql://db.local/ppal?user=ppal&password=word-5", {"word-5"}),
        ("postgresql://ppal:a/b?c#word-6@db.local/ppal", {"a/b?c#word-6"}),
        ("postgresql://ppal:word%2F7@db.local/ppal?sslpassword=word-8", {"word%2F7", "word/7", "word-8"}),
        ("https://user:word-9@host/path", {"word-9"}),
        ("http://host:8080/@me?to=a@b", set()),
        ("s3://bucket/prefix", set()),
        ("no address, pass=word", set()),
    ],
)
def test_passwords_are_found_wherever_they_stand_in_an_address(address, secrets):
    assert passwords_in(address) == secrets


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


def test_slices_are_off_auto_or_a_side_of_tiles(monkeypatch, tmp_path):
    assert load_settings(MODEL_DIR=tmp_path).project_options().slices == "off"
    for given, meant in (("auto", "auto"), ("off", "off"), ("416", 416), ("64", 64), ("4096", 4096)):
        monkeypatch.setenv("PPAL_SLICES", given)
        assert load_settings(MODEL_DIR=tmp_path).project_options().slices == meant
    settings = load_settings(MODEL_DIR=tmp_path)
    assert settings.project_options({"slices": 320}).slices == settings.project_options({"slices": "320"}).slices == 320
    for wrong in (63, 4097, True, 416.0, "some", "", None, [416], "4l6"):
        with pytest.raises(
            SettingsError, match=r"slices: .*expected off, auto, or the side of a tile from 64 to 4096 px"
        ):
            settings.project_options({"slices": wrong})
    monkeypatch.setenv("PPAL_SLICES", "63")
    with pytest.raises(SettingsError, match=r"PPAL_SLICES .slices.: .*from 64 to 4096 px, got '63'"):
        load_settings(MODEL_DIR=tmp_path)


@pytest.mark.parametrize("name", ["LABEL_STUDIO_URL", "LABEL_STUDIO_PUBLIC_URL", "public_url"])
def test_an_address_with_credentials_is_refused_without_showing_them(name):
    with pytest.raises(SettingsError, match="without credentials") as caught:
        load_settings(**{name: "http://me:word-5@ls.local:8080"})
    assert "word-5" not in str(caught.value) and "ls.local" in str(caught.value)


@pytest.fixture
def toml(tmp_path, monkeypatch):
    """Write ``ppal.toml`` into the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    for name in ("PPAL_CONFIG", "PPAL_BUDGET", "START_TRAINING_EACH_N_UPDATES", "PPAL_DELTA", "PPAL_PORT"):
        monkeypatch.delenv(name, raising=False)

    def write(text, name="ppal.toml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def test_the_file_goes_before_defaults_and_fills_the_options_of_projects(toml):
    toml('budget = 33\ndelta = 2.5\nport = 9191\nmodel_dir = "elsewhere"\ndifficulty = false\n')
    settings = load_settings()
    assert (settings.port, str(settings.model_dir)) == (9191, "elsewhere")
    options = settings.project_options({"delta": 3.5})
    assert (options.budget, options.delta, options.difficulty) == (33, 3.5, False)
    assert settings.from_file == {"budget", "delta", "port", "model_dir", "difficulty"}
    assert (
        settings.strategy == ProjectOptions().strategy
        and settings.model_copy(update={"port": 1}).from_file == settings.from_file
    )


@pytest.mark.parametrize("variable", ["PPAL_BUDGET", "START_TRAINING_EACH_N_UPDATES"])
def test_the_environment_goes_before_the_file_by_each_of_its_names(toml, monkeypatch, variable):
    toml("budget = 33\ndelta = 2.5\n")
    monkeypatch.setenv(variable, "44")
    settings = load_settings()
    assert (settings.budget, settings.delta) == (44, 2.5) and settings.from_file == {"delta"}


@pytest.mark.parametrize("name", ["budget", "START_TRAINING_EACH_N_UPDATES", "PPAL_BUDGET"])
def test_an_override_goes_before_the_environment_and_the_file(toml, monkeypatch, name):
    toml("budget = 33\n")
    assert load_settings(**{name: 55}).budget == 55
    monkeypatch.setenv("START_TRAINING_EACH_N_UPDATES", "44")
    assert load_settings(START_TRAINING_EACH_N_UPDATES=55).budget == 55


def test_a_tilde_in_a_path_is_the_home_folder(toml, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    toml('model_dir = "~/data"\nzoo_dir = "~/zoo"\n')
    monkeypatch.delenv("MODEL_DIR", raising=False)
    monkeypatch.setenv("PPAL_CACHE", "~/cache")
    settings = load_settings()
    assert settings.model_dir == tmp_path / "home/data" and settings.state_url.endswith("/home/data/ppal.db")
    assert (settings.own_zoo, settings.cache_dir) == (tmp_path / "home/zoo", tmp_path / "home/cache")
    (tmp_path / "home").mkdir()
    toml("port = 2222\n", "home/other.toml")
    monkeypatch.setenv("PPAL_CONFIG", "~/other.toml")
    assert load_settings().port == 2222 and load_settings(MODEL_DIR="~").model_dir == tmp_path / "home"


@pytest.mark.parametrize("variable", ["MODEL_DIR", "PPAL_CACHE", "PPAL_MODEL_ZOO", "PPAL_CONFIG"])
def test_a_home_folder_that_nobody_knows_is_refused_by_the_settings_name(toml, monkeypatch, variable):
    monkeypatch.setenv(variable, "~nobody-of-this-name/data")
    with pytest.raises(SettingsError, match=rf"{variable}\b.*expected .*~nobody-of-this-name/data"):
        load_settings()


def test_ppal_config_names_another_file(toml, monkeypatch):
    toml("port = 1111\n")
    monkeypatch.setenv("PPAL_CONFIG", str(toml("port = 2222\n", "other.toml")))
    assert load_settings().port == 2222
    monkeypatch.setenv("PPAL_CONFIG", "gone.toml")
    with pytest.raises(SettingsError, match=r"no file gone\.toml"):
        load_settings()


def test_without_a_file_nothing_comes_from_one(toml):
    assert load_settings().from_file == frozenset()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("bugdet = 3\n", "'bugdet' is unknown (known: label_studio_url, model_dir,"),
        ("[project]\nbudget = 3\n", "'project' is unknown"),
        ("PPAL_BUDGET = 3\n", "'PPAL_BUDGET' is unknown"),
        ("port = 70000\n", "port: Input should be less than or equal to 65535, got '70000'"),
        ("budget = \n", "ppal.toml, got a file that cannot be read (Invalid value (at line 1"),
        ("budget = 3\nbudget = 4\n", "cannot be read"),
    ],
)
def test_a_mistake_in_the_file_is_named(toml, text, told):
    toml(text)
    with pytest.raises(SettingsError) as raised:
        load_settings()
    assert told in str(raised.value) and "ppal.toml" in str(raised.value)


@pytest.mark.parametrize(
    ("line", "variable"),
    [
        ('label_studio_api_key = "word-6"', "LABEL_STUDIO_API_KEY"),
        ('basic_auth_pass = "word-6"', "BASIC_AUTH_PASS"),
        ('queue_url = "redis://:word-6@redis:6379/0"', "PPAL_QUEUE_URL"),
        ('database_url = "postgresql://ppal:word-6@db/ppal"', "PPAL_DATABASE_URL"),
        ('database_url = "postgresql://db/ppal?user=ppal&password=word-6"', "PPAL_DATABASE_URL"),
    ],
)
def test_a_secret_in_the_file_is_refused_and_not_shown(toml, line, variable):
    toml(line + "\n")
    with pytest.raises(SettingsError, match=f"set {variable} in the environment") as raised:
        load_settings()
    assert "word-6" not in str(raised.value)


def test_addresses_without_a_password_may_stand_in_the_file(toml):
    toml('queue_url = "redis://redis:6379/0"\ndatabase_url = "postgresql://db/ppal"\n')
    settings = load_settings()
    assert settings.queue_url.get_secret_value() == "redis://redis:6379/0" and settings.state_url.endswith("db/ppal")


def test_the_example_file_holds_every_setting_with_its_default(toml, monkeypatch):
    example = (ROOT / "ppal.example.toml").read_text(encoding="utf-8")
    lines = re.findall(r"^# ?([a-z_]+ = .*)$", example, flags=re.MULTILINE)
    toml("\n".join(lines))
    for name in tuple(os.environ):
        if name.startswith(("PPAL_", "LABEL_STUDIO_")) or name in ("MODEL_DIR", "DEVICE", "LOG_LEVEL", "LOG_FORMAT"):
            monkeypatch.delenv(name)
    settings = load_settings()
    without_default = {"zoo_dir", "threads", "max_iterations", "patience", "image_cache_gib", "pool_minutes"}
    secrets = {"label_studio_api_key", "basic_auth_pass"}
    assert settings.from_file == set(Settings.model_fields) - secrets
    toml("")
    defaults = load_settings()
    for name in settings.from_file - without_default - {"cache_dir", "label_studio_url", "public_url"}:
        assert getattr(settings, name) == getattr(defaults, name), name

"""The compose file, its example of settings and the image say the same as the code."""

import re
from pathlib import Path

import yaml

from ppal_backend.settings import Settings

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docker-compose.yml").read_text()
SERVICES = yaml.safe_load(TEXT)["services"]
EXAMPLE = dict(
    line.split("=", 1) for line in (ROOT / ".env.example").read_text().splitlines() if re.match(r"\w+=", line)
)
OURS = ("ppal", "worker", "ppal-gpu", "worker-gpu")


def names_of_settings():
    for name, field in Settings.model_fields.items():
        alias = field.validation_alias
        yield from alias.choices if hasattr(alias, "choices") else [alias or f"PPAL_{name.upper()}"]


def test_our_variables_are_settings():
    for name in OURS:
        assert set(SERVICES[name]["environment"]) <= set(names_of_settings())


def test_every_variable_of_the_file_is_in_the_example_or_has_a_default():
    for name, rest in re.findall(r"(?<!\$)\$\{(\w+)(:[-?])?", TEXT):
        assert name in EXAMPLE or rest == ":-", name


def test_no_password_is_shipped():
    required = set(re.findall(r"\$\{(\w+):\?", TEXT))
    assert required == {"POSTGRES_PASSWORD", "PPAL_DB_PASSWORD", "REDIS_PASSWORD", "BASIC_AUTH_PASS"}
    assert all(EXAMPLE[name] == "" for name in required)
    for service in SERVICES.values():
        for name, value in service["environment"].items():
            assert "PASS" not in name or value.startswith("${"), name


def test_label_studio_reaches_a_backend_with_a_dot_in_its_name():
    for name in ("ppal", "ppal-gpu"):
        assert SERVICES[name]["networks"]["default"]["aliases"] == ["ppal.local"]
        assert SERVICES[name]["environment"]["PPAL_PUBLIC_URL"] == "http://ppal.local:9090"
    switches = SERVICES["label-studio"]["environment"]
    assert (switches["ML_BLOCK_LOCAL_IP"], switches["SSRF_PROTECTION_ENABLED"]) == ("false", "false")


def test_everything_has_a_health_check_and_listens_on_this_machine_only():
    for name, service in SERVICES.items():
        assert "healthcheck" in service or name in ("ppal", "ppal-gpu"), name  # theirs is the image's
        for port in service.get("ports", ()):
            assert ":-127.0.0.1}" in port


def test_profiles():
    profiles = {name: service.get("profiles") for name, service in SERVICES.items()}
    assert profiles == {
        "label-studio": None, "postgres": None, "redis": None,
        "ppal": ["cpu"], "worker": ["cpu"], "ppal-gpu": ["gpu"], "worker-gpu": ["gpu"],
    }  # fmt: skip
    for name in ("ppal-gpu", "worker-gpu"):
        (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
        assert SERVICES[name]["environment"]["DEVICE"] == "cuda"


def test_the_image_runs_as_an_ordinary_user_and_is_built_by_the_same_script():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    final = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM")) :]
    assert "USER 10001" in final and any(line.startswith("HEALTHCHECK") for line in final)
    assert any("scripts/setup.sh backend" in line for line in lines)

"""The documentation names only commands and settings that exist."""

import re
from pathlib import Path

import pytest
import typer

from ppal_backend.cli import app
from ppal_backend.settings import ProjectOptions, Settings, variables

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "model_zoo" / "README.md"])
NOT_SETTINGS = {
    "PPAL_CONFIG",  # names the settings file
    "PPAL_DB_PASSWORD",  # of docker-compose.yml
    "PPAL_BIND",
    "PPAL_DEV",  # of scripts/setup.sh
    "PPAL_WHEELS",
}


def commands(group):
    found = {}
    for name, command in group.commands.items():
        found[name] = {option for parameter in command.params for option in parameter.opts}
        for inner, sub in getattr(command, "commands", {}).items():
            found[f"{name} {inner}"] = {option for parameter in sub.params for option in parameter.opts}
    return found


KNOWN = commands(typer.main.get_command(app))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_their_options_exist(page):
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    lines = re.findall(r"^(ppal .*)$", text, flags=re.MULTILINE) + re.findall(r"`(ppal [^`]*)`", text)
    for line in lines:
        words = line.split("#")[0].replace("`", "").split()[1:]
        if not words or not re.fullmatch(r"[a-z][a-z-]*", words[0]):
            continue
        name = " ".join(words[:2]) if " ".join(words[:2]) in KNOWN else words[0]
        assert name in KNOWN, f"{page.name}: {line!r} names no command of ppal"
        for option in (word.strip("[]") for word in words if word.strip("[]").startswith("--")):
            assert option in KNOWN[name] | {"--help"}, f"{page.name}: {line!r} names an option that does not exist"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_variables_exist(page):
    known = NOT_SETTINGS | {variable for field in Settings.model_fields for variable in variables(field)}
    named = set(re.findall(r"\bPPAL_[A-Z_]+\b", page.read_text(encoding="utf-8")))
    assert named <= known


def test_the_page_of_settings_lists_every_one():
    table = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    internal = {"max_request_mib"}
    for field in set(Settings.model_fields) - internal:
        assert any(f"`{variable}`" in table for variable in variables(field)), f"docs/settings.md lacks {field}"
    for option in ProjectOptions.model_fields:
        assert f"(`{option}`)" in table, f"docs/settings.md lacks the extra parameter {option}"


def test_every_stop_of_the_tour_is_there():
    """Each line names files, then what to look at in them."""
    for stop in re.findall(
        r"^\d+\. (.*(?:\n   .*)*)", (ROOT / "docs" / "tour.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    ):
        named = re.findall(r"`([^`]+)`", stop)
        files = [ROOT / "ppal_backend" / name for name in named if name.endswith(".py")]
        code = "".join(file.read_text(encoding="utf-8") for file in files)
        assert files, stop
        for name in (name for name in named if not name.endswith(".py")):
            assert re.search(rf"\b(def|class) {name}\b", code), f"{name} is not in {[file.name for file in files]}"


def test_every_command_is_on_the_page_of_commands():
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    for name in KNOWN:
        assert re.search(rf"`ppal {name}\b", page), f"docs/commands.md lacks {name}"

"""Log lines: readable by machines, about the right project, and without secrets."""

import json
import logging

import pytest

from ppal_backend.logs import configure_logging, log_context
from tests.label_studio.fake import LEGACY, PAT

SECRETS = (LEGACY, 'pä"ss\\word', "abc")


@pytest.fixture(autouse=True)
def as_it_was():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def logged(capfd):
    def write(log_format, *args, level="INFO", **options):
        configure_logging("INFO", log_format, SECRETS)
        logging.getLogger("ppal_backend.some").log(getattr(logging, level), *args, **options)
        return capfd.readouterr().err

    return write


def test_json_has_time_level_logger_message_and_what_it_is_about(logged):
    with log_context(project=7), log_context(round=3):
        record = json.loads(logged("json", "step %s", "train", level="WARNING"))
    assert record.pop("timestamp").endswith("+00:00")
    assert record == {
        "level": "WARNING", "logger": "ppal_backend.some", "message": "step train", "project": 7, "round": 3
    }  # fmt: skip
    assert "project" not in json.loads(logged("json", "later"))


def test_json_is_one_line_with_a_traceback_in_it(logged):
    try:
        raise RuntimeError("first\nsecond")
    except RuntimeError:
        text = logged("json", "broke", exc_info=True)
    assert len(text.splitlines()) == 1
    assert "RuntimeError: first\nsecond" in json.loads(text)["traceback"]


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize(
    "hidden",
    [
        LEGACY,
        PAT,
        'pä"ss\\word',
        "Bearer 7.0123456789abcdef",
        "Authorization: Basic dXNlcjpwYXNzd29yZA==",
        "Token 0011223344",
        "postgresql+psycopg://ppal:s3cr%40et@db.local/ppal",
    ],
)
def test_secrets_are_blanked_in_messages_and_tracebacks(logged, log_format, hidden):
    secret = hidden.split()[-1].removeprefix("postgresql+psycopg://ppal:").removesuffix("@db.local/ppal")
    try:
        raise ValueError(hidden)
    except ValueError:
        text = logged(log_format, "failed with %s and %r", hidden, hidden, exc_info=True)
    assert "failed with" in text and "ValueError" in text
    if log_format == "json":
        record = json.loads(text)
        text += record["message"] + record["traceback"]
    assert secret not in text


def test_very_short_secrets_do_not_blank_everything(logged):
    assert "abcdef" in logged("text", "abcdef")


def test_a_message_cannot_look_like_another_record(logged):
    text = logged("text", "refused: %s", "x\n12:00:00 ERROR   root: all is lost\r\x1b[2J")
    lines = text.splitlines()
    assert len(lines) == 2 and lines[1].startswith("    12:00:00")
    assert "\x1b" not in text and "\r" not in text

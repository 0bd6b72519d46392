"""What is installed is pinned: no build fetches the newest of anything. Known vulnerabilities are told from silence."""

import json
import re
import shlex
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from tests.servers import free_port

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import audit  # noqa: E402

SCRIPTS = [*sorted(ROOT.glob("scripts/*.sh")), ROOT / "Dockerfile", ROOT / "Makefile", ROOT / ".ci" / "run"]
VERSIONS = set(re.findall(r"^(\w+)=", (ROOT / "scripts/versions.env").read_text(), re.M))
WITH_VALUE = {"-r", "-c", "-w", "-d", "--index-url", "--find-links", "--only-binary", "--retries", "--timeout"}


def commands(path):
    """Commands of a script, one a line, without comments."""
    text = re.sub(r"\\\n\s*", " ", path.read_text())
    for line in text.splitlines():
        if not line.strip().startswith("#"):
            yield from re.split(r"&&|\|\||;;|;", line)


def pip_commands(path):
    """The words after ``pip install``, ``download`` or ``wheel``, in any of the spellings that the scripts have."""
    for command in commands(path):
        if found := re.search(r"(?:-m pip|\"\$\{pip\[@\]\}\"|\bpip3?) (?:(?:install|download|wheel)\b)?(.*)", command):
            options = r"\"\$\{from\[@\]\}\"|\$\{\w+:\+[^}]*\}"  # indexes, where there are some
            words = shlex.split(re.sub(options, "", found[1]).split(">")[0])
            if "pip=(" not in command and "uninstall" not in command:
                yield command.strip(), words


def unpinned(words):
    """What of a command's words names a package without its exact version."""
    skip, left = False, []
    for word in words:
        value, skip = skip, word in WITH_VALUE
        pins = re.fullmatch(r"[\w.-]+==\$\{?(\w+)\}?", word)
        wheel = word.endswith(".whl") or word == "."
        if not (value or word.startswith("-") or wheel or (pins and pins[1] in VERSIONS)):
            left.append(word)
    return left


def test_the_scan_sees_what_is_not_pinned(tmp_path):
    script = tmp_path / "x.sh"
    lines = ('python -m pip install -q wheel "torch==$TORCH_VERSION" ninja>=1', '"${pip[@]}" --no-deps -r a.txt numpy')
    script.write_text("\n".join(lines))
    assert [unpinned(words) for _, words in pip_commands(script)] == [["wheel", "ninja"], ["numpy"]]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_install_exact_versions_only(path):
    for command, words in pip_commands(path):
        assert unpinned(words) == [], command
        # Whatever else a package asks for would come in its newest version.
        needs_nothing = "--no-deps" in words or "pip==" in command
        assert needs_nothing or ("torch==" in command and "-c" in words), command
    assert not re.findall(r"\b(?:curl|wget|git clone|npm|npx)\b|^ADD ", "\n".join(commands(path)), re.M)


def test_the_scan_reads_every_install_of_the_set_up():
    assert len(list(pip_commands(ROOT / "scripts/setup.sh"))) >= 14


def test_what_comes_as_source_is_built_with_pinned_tools():
    """Built in isolation, a package's build fetches the newest setuptools."""
    for command, words in pip_commands(ROOT / "scripts/setup.sh"):
        source = "-r" in words and "requirements-label-studio.txt" in words
        if source or "." in words or "onedl-mmdetection" in command or "wheel -q" in command:
            assert "--no-build-isolation" in words, command


@pytest.mark.parametrize("name", audit.SETS)
def test_every_requirement_is_an_exact_version(name):
    pins = audit.pinned(name)
    assert len(pins) > 40 and all(re.fullmatch(r"[\w.-]+(\[\w+\])?==[^*]+", pin) for pin in pins)


def test_every_file_of_requirements_is_looked_up():
    listed = {file for files in audit.SETS.values() for file in files}
    assert listed == {path.name for path in ROOT.glob("requirements*.txt")}
    versions = {pin.split("==")[0] for pin in audit.pinned("backend")}
    assert {"torch", "onedl-mmcv", "onedl-mmdetection", "label-studio-ml", "ray", "s3fs"} <= versions
    installed = re.findall(r'"([\w-]+)==\$\w+"', (ROOT / "scripts/setup.sh").read_text())
    assert set(installed) <= versions


def test_images_have_a_version_and_the_docs_say_how_to_pin_their_content():
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    named = {service["image"] for service in compose["services"].values() if not service["image"].startswith("ppal-")}
    text = (ROOT / "Dockerfile").read_text() + (ROOT / "docker-compose.yml").read_text()
    named |= set(re.findall(r"^ARG BASE=(\S+)", text, re.M)) | set(re.findall(r"nvidia/cuda:[\w.-]+", text))
    assert len(named) == 6
    docs = (ROOT / "docs/deploy/README.md").read_text()
    for image in named:
        name, _, tag = image.rpartition(":")
        assert name and re.match(r"v?\d", tag), image
        assert image in docs, f"how to get its digest: {image}"


def test_the_words_for_pip_name_the_tested_versions():
    (words,) = re.findall(r"## From the wheel.*?```bash(.*?)```", (ROOT / "docs/deploy/README.md").read_text(), re.S)
    named = set(re.findall(r"[\w-]+==[\d.]+", words))
    assert len(named) >= 5 and named <= {pin.split("+")[0] for pin in audit.pinned("backend")}


class OSV(BaseHTTPRequestHandler):
    """OSV's service, by what it knows: names of packages with a hole in them; ``silent`` answers with 503."""

    holes: tuple = ()
    silent = False

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]["name"]
        fixed = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0"}]}]
        affected = {"package": {"name": asked, "ecosystem": "PyPI"}, "ranges": fixed}
        hole = {"id": "PYSEC-2026-1", "summary": "x", "affected": [affected]}
        body = json.dumps({"vulns": [hole]} if asked in self.holes else {}).encode()
        self.send_response(503 if self.silent else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


@pytest.fixture
def service(monkeypatch, tmp_path):
    """Runs the audit, with pip-audit itself, on a short list of pins and a service of ours."""
    for name in ("scripts", *(file for files in audit.SETS.values() for file in files)):
        (tmp_path / name).mkdir() if name == "scripts" else (tmp_path / name).write_text("six==1.17.0\nFlask==3.1.3\n")
    shutil.copy(ROOT / "scripts/versions.env", tmp_path / "scripts")
    monkeypatch.setattr(audit, "ROOT", tmp_path)
    monkeypatch.setattr(audit, "BUILD", tmp_path / "build")
    monkeypatch.setattr(audit, "SETS", {"backend": audit.SETS["backend"]})
    handler = type("Handler", (OSV,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.run = lambda *words, port=server.server_port: audit.main(["--osv-url", f"http://127.0.0.1:{port}/", *words])
    yield handler
    server.shutdown()
    server.server_close()


def test_nothing_known_passes_and_the_bill_lists_everything(service, capsys, tmp_path):
    assert service.run() == 0
    assert "backend: 10 versions looked up, 0 known vulnerabilities\n" in capsys.readouterr().out
    bill = json.loads((tmp_path / "build" / "sbom-backend.json").read_text())
    assert {"torch", "six", "Flask"} <= {part["name"] for part in bill["components"]}


def test_a_known_vulnerability_fails_in_any_case(service, capsys):
    service.holes = ("flask",)
    assert service.run() == service.run("--if-answered") == 1
    assert "audit: backend: flask 3.1.3: PYSEC-2026-1, fixed in 99.0" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["away", "silent"])
def test_without_an_answer_it_is_told_and_passes_only_where_that_is_allowed(service, capsys, kind):
    service.silent = True
    port = {"port": free_port()} if kind == "away" else {}
    assert service.run("--if-answered", **port) == 0
    said = capsys.readouterr().out
    assert "audit: SKIPPED" in said
    assert "audit: backend: 0 versions looked up, 0 known vulnerabilities; 10 NOT looked up: " in said
    assert service.run(**port) == 1 and "no answer is not a clean one" in capsys.readouterr().err


def test_ci_asks_and_releases_insist():
    assert "make audit ARGS=--if-answered" in (ROOT / ".ci/run").read_text()
    releasing = (ROOT / "docs/development.md").read_text().split("## Releasing")[1]
    assert "make audit" in releasing and "make audit ARGS=--if-answered" not in releasing

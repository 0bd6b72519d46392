"""A Label Studio of one's own: the installed one on a free port with its own data.

An empty database is migrated once a version and kept: the first migration on SQLite takes half a minute.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import requests

from ppal_backend.errors import LabelStudioError, LabelStudioUnavailable
from ppal_backend.launcher import dies_with_parent
from ppal_backend.rig.session import LabelStudioSession, decode, send

logger = logging.getLogger(__name__)

KILL_WAIT_S = 5.0

UPLOAD_BATCH = 100
"""Files in one upload; Label Studio refuses more by default."""
_KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "SYSTEMROOT")
_QUIET = {
    "COLLECT_ANALYTICS": "false",
    "LATEST_VERSION_CHECK": "false",
    "SENTRY_DSN": "",
    "FRONTEND_SENTRY_DSN": "",
    "DEBUG": "false",
    "DJANGO_DB": "sqlite",
}
_LOCAL_BACKENDS = {"ML_BLOCK_LOCAL_IP": "false", "SSRF_PROTECTION_ENABLED": "false"}


class LabelStudioServer:
    """A running Label Studio; use it as a context manager.

    Args:
        binary: The ``label-studio`` command of the environment it is installed in.
        data_dir: Folder for its database, uploads and log; made when missing, reused when it has been used before.
        port: Port to listen on; None = any free one.
        bind: Address to listen on.
        username: E-mail address of the user to make.
        password: That user's password, at least 8 characters.
        template_cache: Folder that keeps a migrated empty database by version (the first migration takes half a
            minute); None = migrate in ``data_dir``.
        start_timeout_s: How long it may take to answer.
        environment: More settings for Label Studio, without the ``LABEL_STUDIO_`` prefix.
        on_wait: Called with the seconds waited so far, about once a second, until it answers.
    """

    def __init__(
        self,
        binary: Path,
        data_dir: Path,
        *,
        port: int | None = None,
        bind: str = "127.0.0.1",
        username: str = "demo@example.com",
        password: str = "ppal-demo",
        template_cache: Path | None = None,
        start_timeout_s: float = 240.0,
        environment: Mapping[str, str] | None = None,
        on_wait: Callable[[float], None] | None = None,
    ) -> None:
        self.binary = Path(binary).absolute()
        self.data_dir = Path(data_dir).absolute()
        self.username = username
        self.password = password
        self.log_path = self.data_dir / "label-studio.log"
        self._wanted_port = port
        self._bind = bind
        self._template_cache = template_cache
        self._start_timeout_s = start_timeout_s
        self._environment = dict(environment or {})
        self._on_wait = on_wait
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._url = ""
        self._token = ""
        self._session: LabelStudioSession | None = None

    @property
    def url(self) -> str:
        """Its address, such as http://127.0.0.1:41873; empty before the start."""
        return self._url

    @property
    def token(self) -> str:
        """A personal access token of the user; empty before the start."""
        return self._token

    @property
    def session(self) -> LabelStudioSession:
        """A session of the user.

        Raises:
            LabelStudioUnavailable: The server has not been started.
        """
        if self._session is None:
            raise LabelStudioUnavailable("expected a started Label Studio, got none; call start() first")
        return self._session

    def __enter__(self) -> LabelStudioServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, wait until it answers, make the user and a personal access token.

        Raises:
            LabelStudioUnavailable: The command is missing, it ended, or it did not answer in time; the message ends
                with the last lines of its log.
            LabelStudioAuthError: ``data_dir`` belongs to a user with another password.
        """
        if not self.binary.is_file():
            raise LabelStudioUnavailable(
                f"expected label-studio at {self.binary}, got none; install Label Studio there"
            )
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._template_cache is not None:
            copy_template(self.binary, self._template_cache, self.data_dir, isolated_environment(self.data_dir))
        try:
            for attempt in range(3):
                port = self._wanted_port or free_port()
                self._launch(port)
                if self._wait_until_healthy(may_move=self._wanted_port is None and attempt < 2):
                    break
            self._token = personal_token(self._url, self.username, self.password)
            self._session = LabelStudioSession(self._url, self._token)
        except BaseException:
            self.stop()
            raise

    def stop(self, grace_s: float = 10.0) -> None:
        """End it and everything it started; does nothing when it is not running."""
        if self._session is not None:
            self._session.close()
            self._session = None
        process, self._process = self._process, None
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                break
            try:
                process.wait(grace_s)
                if number == signal.SIGTERM and not _group_alive(process.pid):
                    break
            except subprocess.TimeoutExpired:
                logger.warning("Label Studio did not end within %s s", grace_s)
        process.wait()
        deadline = time.monotonic() + KILL_WAIT_S  # what it started was killed with it, and ends a moment later
        while _group_alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)

    def create_project(self, title: str, label_config: str, **fields: Any) -> int:
        """Create a project and return its id; ``fields`` as in Label Studio's project API."""
        body = {"title": title, "label_config": label_config, **fields}
        return int(self.session.post("/api/projects/", json=body)["id"])

    def import_images(
        self,
        project_id: int,
        paths: Sequence[Path],
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> dict[int, Path]:
        """Upload image files, one task each.

        Args:
            project_id: Where to.
            paths: The files; their names need not differ.
            on_progress: Called with (uploaded, total) after each batch.

        Returns:
            Path by task id.

        Raises:
            LabelStudioError: Label Studio did not make one task per file.
        """
        names = upload_names(paths)
        tasks: list[int] = []
        for start in range(0, len(paths), UPLOAD_BATCH):
            batch = names[start : start + UPLOAD_BATCH]
            tasks += self._upload(project_id, batch, paths[start : start + UPLOAD_BATCH])
            if on_progress is not None:
                on_progress(len(tasks), len(paths))
        by_name = dict(zip(names, paths, strict=True))
        return {task_id: by_name[name] for task_id, name in self._task_names(project_id, tasks).items()}

    def _upload(self, project_id: int, names: Sequence[str], paths: Sequence[Path]) -> list[int]:
        files = {
            f"file{index:04d}": (name, path.read_bytes())
            for index, (name, path) in enumerate(zip(names, paths, strict=True))
        }
        query = {"return_task_ids": "true"}
        answer = self.session.post(f"/api/projects/{project_id}/import", params=query, files=files)
        made = [int(task_id) for task_id in answer.get("task_ids") or ()]
        if len(made) != len(paths):
            raise LabelStudioError(
                f"expected {len(paths)} tasks for as many files, got {len(made)}; see {self.log_path}"
            )
        return made

    def _task_names(self, project_id: int, task_ids: Sequence[int]) -> dict[int, str]:
        """The upload name of each task, read back from Label Studio."""
        wanted = set(task_ids)
        found: dict[int, str] = {}
        page = 1
        while len(found) < len(wanted):
            query = {
                "project": project_id,
                "page": page,
                "page_size": 500,
                "fields": "task_only",
                "resolve_uri": "false",
            }
            rows = self.session.get("/api/tasks", params=query)["tasks"]
            for row in rows:
                if row["id"] in wanted:
                    address = next(value for value in row["data"].values() if "/upload/" in str(value))
                    found[row["id"]] = str(address).rsplit("/", 1)[-1].split("-", 1)[-1]
            page += 1
        return found

    def _launch(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        variables = isolated_environment(self.data_dir)
        settings = {
            "HOST": self._url,
            "USERNAME": self.username,
            "PASSWORD": self.password,
            **_LOCAL_BACKENDS,
            **self._environment,
        }
        variables.update({f"LABEL_STUDIO_{name}": value for name, value in settings.items()})
        command = [str(self.binary), "start", "--no-browser", "--internal-host", self._bind, "--port", str(port)]
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                command, env=variables, cwd=self.data_dir, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=dies_with_parent(),
            )  # fmt: skip

    def _wait_until_healthy(self, *, may_move: bool) -> bool:
        """Wait for /health; False when somebody else took the port and another one may be tried."""
        began = time.monotonic()
        told = 0.0
        while True:
            waited = time.monotonic() - began
            if self._on_wait is not None and waited - told >= 1.0:
                told = waited
                self._on_wait(waited)
            if self._process is None or self._process.poll() is not None:
                raise LabelStudioUnavailable(f"expected Label Studio to run, got an end of it\n{self.log_tail()}")
            if "is in use" in self._log():
                if may_move:
                    self.stop()
                    return False
                raise LabelStudioUnavailable(f"expected {self._url} to be free, got a port in use; choose another")
            if _answers(f"{self._url}/health"):
                return True
            if waited > self._start_timeout_s:
                limit = f"{self._start_timeout_s:.0f} s"
                raise LabelStudioUnavailable(f"expected Label Studio within {limit}, got no answer\n{self.log_tail()}")
            time.sleep(0.1)

    def _log(self) -> str:
        """What the present process has written."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode("utf-8", "replace")

    def log_tail(self) -> str:
        """The last lines of its log."""
        return "\n".join(self._log().splitlines()[-20:]) if self.log_path.exists() else ""


def personal_token(url: str, username: str, password: str, timeout_s: float = 60.0) -> str:
    """Log in as a person does and make a personal access token; the user's earlier ones end.

    Raises:
        LabelStudioAuthError: There is no such user with this password.
        LabelStudioUnavailable: Label Studio does not answer.
    """
    with requests.Session() as http:
        http.trust_env = False

        def call(method: str, path: str, **options: Any) -> requests.Response:
            headers = {"X-CSRFToken": http.cookies.get("csrftoken", ""), "Referer": url}
            return send(http, method, url + path, timeout_s, headers=headers, allow_redirects=False, **options)

        call("GET", "/user/login/")
        call("POST", "/user/login/", data={"email": username, "password": password})
        answer = call("POST", "/api/token/")
        if answer.status_code == 409:
            for old in decode(call("GET", "/api/token/")):
                call("POST", "/api/token/blacklist/", json={"refresh": old["token"]})
            answer = call("POST", "/api/token/")
        return str(decode(answer)["token"])


def isolated_environment(data_dir: Path) -> dict[str, str]:
    """Environment of a Label Studio that reads no stray settings and calls nobody outside."""
    kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    quiet = {f"LABEL_STUDIO_{name}": value for name, value in _QUIET.items()}
    return {**kept, **quiet, "LABEL_STUDIO_BASE_DATA_DIR": str(data_dir), "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    """A TCP port that is free on the loopback address right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def upload_names(paths: Sequence[Path]) -> list[str]:
    """Distinct names that Label Studio stores unchanged: its own characters only, at most 60 of them."""
    names: list[str] = []
    taken: set[str] = set()
    for index, path in enumerate(paths):
        stem = re.sub(r"[^A-Za-z0-9_.]", "_", path.stem)[-40:].strip(".") or "image"
        name = stem + path.suffix.lower()
        if name in taken:
            name = f"{stem}_{index:06d}{path.suffix.lower()}"
        taken.add(name)
        names.append(name)
    return names


def _answers(url: str) -> bool:
    try:
        with requests.Session() as http:
            http.trust_env = False
            return http.get(url, timeout=5.0).status_code == 200
    except requests.RequestException:
        return False


def _group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


logger = logging.getLogger(__name__)

DATABASE = "label_studio.sqlite3"


def copy_template(binary: Path, cache: Path, data_dir: Path, environment: Mapping[str, str]) -> None:
    """Give ``data_dir`` a migrated database unless it has one.

    Args:
        binary: The ``label-studio`` command.
        cache: Folder of the templates; filled when the version's template is missing.
        data_dir: Label Studio's data folder.
        environment: Environment of the command.

    Raises:
        LabelStudioUnavailable: The migration failed.
    """
    target = data_dir / DATABASE
    if target.exists():
        return
    template = prepare_template(binary, cache, environment)
    if template is None:
        return
    part = data_dir / f"{DATABASE}.part"
    shutil.copyfile(template, part)
    part.replace(target)


def prepare_template(binary: Path, cache: Path, environment: Mapping[str, str]) -> Path | None:
    """Make the template of this Label Studio's version unless there is one; processes wait for each other.

    Returns:
        Its path, or None when the version cannot be told.

    Raises:
        LabelStudioUnavailable: The migration failed.
    """
    version = installed_version(binary)
    if version is None:
        logger.info("no version of Label Studio found beside %s: no template", binary)
        return None
    cache.mkdir(parents=True, exist_ok=True)
    template = cache / f"label-studio-{version}.sqlite3"
    with (cache / f"label-studio-{version}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not template.exists():
            _migrate(binary, template, environment)
    return template


def installed_version(binary: Path) -> str | None:
    """Version of the Label Studio whose command this is; None when its metadata cannot be found."""
    found = sorted(binary.parent.parent.glob("lib/python*/site-packages/label_studio-*.dist-info"))
    return found[-1].name.removeprefix("label_studio-").removesuffix(".dist-info") if found else None


def _migrate(binary: Path, template: Path, environment: Mapping[str, str]) -> None:
    logger.info("migrating an empty Label Studio database; this takes about half a minute, once")
    with tempfile.TemporaryDirectory(prefix=".migrate.", dir=template.parent) as folder:
        variables = {**environment, "LABEL_STUDIO_BASE_DATA_DIR": folder}
        done = subprocess.run([str(binary), "version"], env=variables, cwd=folder, capture_output=True, check=False)
        database = Path(folder) / DATABASE
        if done.returncode != 0 or not database.exists():
            tail = (done.stdout + done.stderr).decode("utf-8", "replace")[-1500:]
            raise LabelStudioUnavailable(f"expected Label Studio to migrate, got exit code {done.returncode}\n{tail}")
        database.replace(template)

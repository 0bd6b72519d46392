"""gunicorn's configuration: ``gunicorn -c …/gunicorn_conf.py "ppal_backend.service.app:create_app()"``.

One process with threads: requests are short or wait for the detector's own process, and the counters of
``/metrics`` and the wrong credentials counted per address are in this process's memory. There is no
``preload_app``: database connections and locks must not be shared over a fork.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from gunicorn.glogging import Logger

from ppal_backend.logs import configure_logging
from ppal_backend.service.runtime import EXTENSION, MOST_PREDICTING
from ppal_backend.settings import load_settings


class RootLogger(Logger):
    """gunicorn's messages through the root logger: in its format, and with secrets blanked."""

    def setup(self, cfg: Any) -> None:
        """Set levels, no handlers."""
        self.error_log.setLevel(self.LOG_LEVELS[cfg.loglevel])
        self.error_log.propagate = True


_settings = load_settings()
# Before the fork: the serving process inherits it.
configure_logging(_settings.log_level, _settings.log_format, _settings.secrets)

bind = f"{_settings.host}:{_settings.port}"
worker_class = "gthread"
workers = 1
threads = MOST_PREDICTING + 8
preload_app = False
timeout = 120  # of the worker's heartbeat; a slow /predict does not hold it up
graceful_timeout = 30
keepalive = 5
backlog = 256
limit_request_line = 8190
accesslog = None
logger_class = RootLogger
control_socket_disable = True
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a heartbeat file on a slow disk may block
loglevel = _settings.log_level.lower()


def when_ready(server: Any) -> None:
    """Hear a SIGTERM that came while this process started; see :func:`ppal_backend.launcher.serve`."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def worker_exit(server: Any, worker: Any) -> None:
    """End the prediction process with the worker, so that none is left behind."""
    app = getattr(worker.app, "callable", None)
    runtime = getattr(app, "extensions", {}).get(EXTENSION)
    if runtime is not None:
        runtime.close()

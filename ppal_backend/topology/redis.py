"""A Redis of one's own, from the system's packages."""

from __future__ import annotations

import shutil
from pathlib import Path

from ppal_backend.errors import SettingsError
from ppal_backend.topology.server import Server


class RedisServer(Server):
    """Redis on the loopback address, with a password.

    Args:
        folder: for its data, made when missing.
        port: to listen on.
        password: for everybody.
        log: file for what it prints.
        durable: False for tests: nothing is written to disk.

    Raises:
        SettingsError: it is not installed.
    """

    def __init__(self, folder: Path, port: int, password: str, log: Path, durable: bool = True) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            raise SettingsError("expected Redis, got none; install it (Debian: apt-get install redis-server)")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.url = f"redis://:{password}@127.0.0.1:{port}/0"
        lines = ("bind 127.0.0.1", f"port {port}", f"requirepass {password}", f'dir "{folder}"', 'save ""',
                 f"appendonly {'yes' if durable else 'no'}")  # fmt: skip
        super().__init__("Redis", [binary, "-"], log, self._answers, config="\n".join(lines) + "\n")

    def _answers(self) -> bool:
        import redis

        client = redis.Redis.from_url(self.url, socket_connect_timeout=5)
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
        finally:
            client.close()

"""Take the pictures of the dashboard in docs/img, in Debian's Chromium.

    python scripts/screenshots.py --demo demo-run                       # what a finished demo left
    python scripts/screenshots.py --url http://127.0.0.1:9090 --user op --password …    # a running backend

Of a finished demo a copy of the state is served, with a sign of life of a worker in it; the demo itself stays as it
is. Take ``now`` from a running backend while a round runs: ``--pages now``.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from werkzeug.serving import make_server

from ppal_backend.service.app import create_app
from ppal_backend.settings import load_settings
from ppal_backend.store import Heartbeat, open_store

CHROMIUM = "/usr/bin/chromium"
WIDE, NARROW = 1280, 390
HIGHEST = {WIDE: 1500, NARROW: 1700}
PAGES = ("projects", "now", "learning", "classes", "queue", "quality", "settings")
NARROW_PAGES = ("now", "queue", "learning")
COLOURS = 256
WAIT_MS = 60_000


@dataclass(frozen=True)
class Service:
    """A dashboard to take pictures of, and the login it asks for."""

    url: str
    user: str = ""
    password: str = ""


def main() -> None:
    """Take every picture that is asked for."""
    options = _arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    opened = _served(options.demo) if options.demo else _running(options)
    with opened as service, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for name in options.pages:
            for width in (WIDE, NARROW) if name in NARROW_PAGES else (WIDE,):
                path = options.out / f"dashboard-{name}{'-narrow' if width == NARROW else ''}.png"
                _take(browser, service, _address(service, name, options.project), width, path)
                print(path)
        browser.close()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Take the pictures of the dashboard.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--demo", type=Path, help="folder of a finished demo")
    where.add_argument("--url", help="address of a running backend")
    parser.add_argument("--user", default="", help="login of the running backend")
    parser.add_argument("--password", default="")
    parser.add_argument("--project", type=int, default=1)
    parser.add_argument("--pages", nargs="+", choices=PAGES, default=PAGES)
    parser.add_argument("--out", type=Path, default=Path("docs/img"))
    return parser.parse_args()


@contextmanager
def _running(options: argparse.Namespace) -> Iterator[Service]:
    yield Service(options.url.rstrip("/"), options.user, options.password)


@contextmanager
def _served(demo: Path) -> Iterator[Service]:
    """A copy of a demo's state behind a server of our own."""
    source = (demo / "backend").resolve()
    if not (source / "ppal.db").is_file():
        sys.exit(f"expected a finished demo in {demo}, got no backend/ppal.db; run ppal demo --exit --out {demo}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for path in source.iterdir():
            if path.is_dir():
                (root / path.name).symlink_to(path)
            elif path.name.startswith("ppal.db"):
                shutil.copy(path, root / path.name)
        settings = load_settings(MODEL_DIR=root, LABEL_STUDIO_API_KEY="unused")
        store = open_store(settings)
        heartbeat, stop = Heartbeat(store.workers), threading.Event()
        threading.Thread(target=_live, args=(heartbeat, stop), daemon=True).start()
        server = make_server("127.0.0.1", 0, create_app(settings, store), threaded=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield Service(f"http://127.0.0.1:{server.port}")
        finally:
            stop.set()
            server.shutdown()
            store.close()


def _live(heartbeat: Heartbeat, stop: threading.Event) -> None:
    while True:
        heartbeat.beat()
        if stop.wait(1.0):
            return


def _address(service: Service, name: str, project: int) -> str:
    if name == "projects":
        return f"{service.url}/ui/"
    return f"{service.url}/ui/projects/{project}/{'' if name == 'now' else name}"


def _take(browser: Browser, service: Service, address: str, width: int, path: Path) -> None:
    login: dict[str, Any] = {}
    if service.user:
        login = {"http_credentials": {"username": service.user, "password": service.password}}
    context = browser.new_context(viewport={"width": width, "height": 900}, **login)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    answer = page.goto(address)
    if answer is None or answer.status != 200:
        sys.exit(f"expected {address} to answer 200, got {answer.status if answer else 'nothing'}")
    _settle(page)
    height = min(HIGHEST[width], page.evaluate("document.documentElement.scrollHeight"))
    shot = page.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": width, "height": height})
    Image.open(io.BytesIO(shot)).convert("RGB").quantize(COLOURS).save(path, optimize=True)
    context.close()


def _settle(page: Page) -> None:
    """Wait until all pictures are there; on the map, point at the first task of the query set."""
    if page.locator("#map").count():
        page.locator("#map[data-ready]").wait_for()
        page.focus("#map canvas")
        page.keyboard.press("Home")
        page.locator("#map .shown img").wait_for()
        page.evaluate("document.activeElement.blur()")
    page.evaluate(
        "Promise.all([...document.images].map((image) => { image.loading = 'eager'; return image.decode(); }))"
    )


if __name__ == "__main__":
    main()

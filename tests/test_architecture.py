"""Imports point downward only, and each heavy framework has one door."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ppal_backend"

# Each room with the rooms it may import, beside itself. A room is a folder or a module of the package.
GROUND = {"errors", "files", "settings", "structures", "logs"}
ALLOWED = {
    "errors": set(),
    "files": set(),
    "logs": set(),
    "settings": {"errors"},
    "structures": {"errors"},
    "acquisition": {"errors", "structures"},
    "store": GROUND,
    "datasets": GROUND,
    "detector": {"errors", "files", "structures", "acquisition", "datasets.coco"},
    "label_studio": GROUND | {"datasets", "rounds.ports"},
    "engines": GROUND | {"detector", "store", "acquisition", "rounds.ports"},
    "rounds": GROUND | {"acquisition", "datasets"},
    "service": GROUND
    | {
        "store",
        "worker.queue",
        "engines",
        "label_studio",
        "datasets",
        "detector.zoo",
        "acquisition",
        "operations",
        "doctor",
        "rounds.detections_store",
        "rounds.folder",
        "rounds.labelled",
        "rounds.model_errors",
        "rounds.similar",
        "rounds.review",
    },
    "demo": GROUND | {"store", "datasets", "rounds", "synthetic", "rig"},
    "synthetic": GROUND,
    "simulation": GROUND | {"rounds", "engines", "detector.zoo", "datasets", "acquisition", "synthetic"},
    "operations": GROUND | {"store", "rounds", "label_studio", "datasets", "detector.zoo"},
    "worker": GROUND | {"operations", "store", "rounds", "engines", "label_studio", "datasets", "service.auth"},
    "launcher": GROUND,
    "rig": GROUND | {"store", "launcher"},
    "doctor": GROUND
    | {
        "store",
        "worker.queue",
        "label_studio",
        "service.auth",
        "service.readiness",
        "detector.environment",
        "operations.control",
        "operations.detectors",
        "rounds.bucket",
    },
    "cli": None,
    "__main__": {"cli"},
    "commands": None,
    "__init__": set(),
}
ONE_DOOR = {"mmdet": "detector", "mmcv": "detector", "mmengine": "detector", "label_studio_sdk": "label_studio",
            "sqlalchemy": "store", "alembic": "store", "huey": "worker", "ray": "engines"}  # fmt: skip
PURE = {"acquisition": {"numpy", "torch", "scipy", "kmedoids"}, "structures": {"numpy", "torch"}}
NOT_AT_IMPORT = {"service", "label_studio", "store", "datasets", "cli", "worker", "launcher",
                 "settings"}  # fmt: skip
HEAVY = {"torch", "mmdet", "mmcv", "mmengine", "skimage"}

ROOMS = {}  # name -> its files
for _path in sorted(PACKAGE.rglob("*.py")):
    ROOMS.setdefault(_path.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(_path)


def imports(path, top_level_only=False):
    """Dotted names a file imports; without those under ``if TYPE_CHECKING``."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        type_checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        inside_function = top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if type_checking or inside_function:
            skipped.update(id(child) for child in ast.walk(node))
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the project imports by full name"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_has_a_rule():
    assert ROOMS.keys() == ALLOWED.keys()


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_downward(room):
    for path in ROOMS[room]:
        for name in imports(path):
            assert is_allowed(room, name), f"{path.relative_to(PACKAGE)} must not import {name}"


def is_allowed(room, name):
    allowed = ALLOWED[room]
    if allowed is None:
        return True
    if name.split(".")[0] in ("benchmarks", "tests", "scripts"):
        return False
    if not name.startswith("ppal_backend."):
        return True
    inner = name.removeprefix("ppal_backend.")
    target = inner.split(".")[0]
    fine = target == room or any(inner == a or inner.startswith(a + ".") for a in allowed)
    parent_of_fine = any(a.startswith(inner + ".") for a in allowed)
    return fine or parent_of_fine or target not in ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_each_framework_has_one_door(room):
    for path in ROOMS[room]:
        for name in imports(path):
            top = name.split(".")[0]
            assert ONE_DOOR.get(top, room) == room, (
                f"{path.relative_to(PACKAGE)}: only {ONE_DOOR[top]} may import {top}"
            )


@pytest.mark.parametrize("room", sorted(PURE))
def test_pure_rooms_import_nothing_that_acts(room):
    acting = {"os", "pathlib", "time", "datetime", "random", "logging.handlers", "subprocess", "io", "socket"}
    for path in ROOMS[room]:
        for name in imports(path):
            top = name.split(".")[0]
            assert top not in acting, f"{path.name} imports {name}"
            if top not in PURE[room] and top != "ppal_backend":
                assert top in __import__("sys").stdlib_module_names, f"{path.name} imports {name}"


@pytest.mark.parametrize("room", sorted(NOT_AT_IMPORT))
def test_light_rooms_import_nothing_heavy_at_import(room):
    for path in ROOMS[room]:
        if path.name == "ml_base.py":
            continue  # label-studio-ml itself imports torch
        for name in imports(path, top_level_only=True):
            assert name.split(".")[0] not in HEAVY, f"{path.relative_to(PACKAGE)} imports {name} when it is imported"

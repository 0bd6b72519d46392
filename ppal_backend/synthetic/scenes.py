"""The demo data: a deterministic, long-tailed detection set with look-alikes, near-duplicates and clutter.

    out/images/000001.jpg …   out/annotations.json (COCO)   out/manifest.json (parameters and checksum)

``file_name`` in ``annotations.json`` is relative to ``out/images``. Every COCO image carries two more fields:
``group``, the id of its scene (near-duplicates share it), and ``scene``, one of empty, easy, busy, rare.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ppal_backend.errors import DatasetError, SettingsError
from ppal_backend.synthetic.glyphs import GlyphSheet, glyph_family
from ppal_backend.synthetic.layout import ScenePlan, moved, plan_scenes, random_layout
from ppal_backend.synthetic.photographs import Photographs
from ppal_backend.synthetic.rendering import Rendered, render

logger = logging.getLogger(__name__)

GENERATOR_VERSION = 1
"""Raised whenever equal parameters give other pictures."""
ANNOTATIONS = "annotations.json"
MANIFEST = "manifest.json"
IMAGES = "images"


@dataclass(frozen=True)
class SceneParameters:
    """All that a generated set depends on.

    Attributes:
        images: Number of images, >= 1.
        seed: Any non-negative integer.
        glyphs: Name of a glyph family.
        size: Short side in px, >= 32.
        burst_share: Share of the images in bursts of near-duplicates, in [0, 1]; None = the family's own.
        burst_frames: Smallest and largest number of images of a burst.
        aspect_ratios: Ratios width / height to draw from; (1.0,) = squares.
        quality: JPEG quality.
    """

    images: int = 360
    seed: int = 0
    glyphs: str = "demo"
    size: int = 128
    burst_share: float | None = None
    burst_frames: tuple[int, int] = (8, 16)
    aspect_ratios: tuple[float, ...] = (1.0,)
    quality: int = 90

    def __post_init__(self) -> None:
        glyph_family(self.glyphs)
        smallest, largest = self.burst_frames
        checks = (
            (self.images >= 1, "images >= 1", self.images),
            (self.seed >= 0, "seed >= 0", self.seed),
            (32 <= self.size <= 4096, "size from 32 to 4096 px", self.size),
            (self.burst_share is None or 0 <= self.burst_share <= 1, "burst_share in [0, 1]", self.burst_share),
            (2 <= smallest <= largest, "burst_frames (smallest >= 2, largest)", self.burst_frames),
            (all(0.25 <= ratio <= 4 for ratio in self.aspect_ratios), "ratios 0.25 to 4", self.aspect_ratios),
            (len(self.aspect_ratios) > 0, "at least one aspect ratio", self.aspect_ratios),
            (1 <= self.quality <= 100, "quality from 1 to 100", self.quality),
        )
        for holds, expected, got in checks:
            if not holds:
                raise SettingsError(f"demo data: expected {expected}, got {got}; choose another value")

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, the same for equal parameters."""
        return dict(json.loads(json.dumps(asdict(self))))


def generate(
    out: Path,
    images: int = 360,
    seed: int = 0,
    glyphs: str = "demo",
    size: int = 128,
    *,
    burst_share: float | None = None,
    burst_frames: tuple[int, int] = (8, 16),
    aspect_ratios: Sequence[float] = (1.0,),
    quality: int = 90,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a set, or reuse a finished one of the same parameters.

    Args:
        out: Folder of the set; made, or replaced when an earlier set of other parameters is there.
        images: Number of images; this and the arguments below but the last: see ``SceneParameters``.
        on_progress: Called with (done, total) after each image.

    Returns:
        Path of ``annotations.json``.

    Raises:
        SettingsError: A parameter is out of range.
        DatasetError: ``out`` holds something that this function did not write.
    """
    parameters = SceneParameters(images, seed, glyphs, size, burst_share, burst_frames, tuple(aspect_ratios), quality)
    out = Path(out)
    if is_complete(out, parameters):
        logger.info("demo data: reusing %s", out)
        return out / ANNOTATIONS
    _refuse_foreign(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _write_set(work, parameters, on_progress)
        work.chmod(0o755)
        _install(work, out, parameters)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out / ANNOTATIONS


def is_complete(out: Path, parameters: SceneParameters) -> bool:
    """Whether ``out`` holds a finished, undamaged set of these parameters."""
    manifest = read_manifest(out)
    if manifest is None or manifest.get("parameters") != parameters.as_dict():
        return False
    if manifest.get("generator") != GENERATOR_VERSION:
        return False
    try:
        return checksum(out) == manifest.get("sha256")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest in ``out``; None when there is none or it cannot be read."""
    try:
        content = json.loads((Path(out) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def checksum(out: Path) -> str:
    """sha256 over ``annotations.json`` and the bytes of its images, in file order."""
    content = (Path(out) / ANNOTATIONS).read_bytes()
    digest = hashlib.sha256(content)
    for image in json.loads(content)["images"]:
        digest.update((Path(out) / IMAGES / image["file_name"]).read_bytes())
    return digest.hexdigest()


def plan_set(parameters: SceneParameters) -> list[ScenePlan]:
    """The plans of a set, in file order."""
    family = glyph_family(parameters.glyphs)
    share = family.burst_share if parameters.burst_share is None else parameters.burst_share
    return plan_scenes(parameters.images, family, share, parameters.burst_frames, _generator(parameters, 1))


def render_scene(plan: ScenePlan, parameters: SceneParameters, sheet: GlyphSheet, photographs: Photographs) -> Rendered:
    """The picture of one plan; depends on nothing but its arguments."""
    family = glyph_family(parameters.glyphs)
    scene_rng = _generator(parameters, 2, plan.group)
    ratio = parameters.aspect_ratios[int(scene_rng.integers(len(parameters.aspect_ratios)))]
    width = round(parameters.size * max(1.0, ratio))
    height = round(parameters.size / min(1.0, ratio))
    extent = (width / parameters.size, height / parameters.size)
    layout = random_layout(plan.scene, plan.labels, family, extent, scene_rng)
    heading = float(scene_rng.uniform(0.0, 360.0))
    frame_rng = _generator(parameters, 3, plan.group, plan.frame)
    if plan.frames > 1:
        layout = moved(layout, plan.frame / (plan.frames - 1) - 0.5, heading, frame_rng)
    return render(layout, width, height, sheet, photographs, frame_rng)


def _write_set(work: Path, parameters: SceneParameters, on_progress: Callable[[int, int], None] | None) -> None:
    family = glyph_family(parameters.glyphs)
    sheet, photographs = GlyphSheet.load(), Photographs.load()
    category_ids = {label: index for index, label in enumerate(family.labels, start=1)}
    plans = plan_set(parameters)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (work / IMAGES).mkdir()
    for image_id, plan in enumerate(plans, start=1):
        rendered = render_scene(plan, parameters, sheet, photographs)
        height, width = rendered.pixels.shape[:2]
        name = f"{image_id:06d}.jpg"
        buffer = BytesIO()
        Image.fromarray(rendered.pixels).save(buffer, "JPEG", quality=parameters.quality, subsampling=0)
        (work / IMAGES / name).write_bytes(buffer.getvalue())
        image = {"id": image_id, "file_name": name, "width": width, "height": height}
        images.append({**image, "group": plan.group, "scene": plan.scene})
        for label, box in rendered.objects:
            annotations.append(_annotation(len(annotations) + 1, image_id, category_ids[label], box))
        if on_progress is not None:
            on_progress(image_id, len(plans))
    categories = [{"id": number, "name": label} for label, number in category_ids.items()]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (work / ANNOTATIONS).write_text(json.dumps(coco), encoding="utf-8")
    (work / MANIFEST).write_text(json.dumps(_manifest(work, parameters, coco), indent=1), encoding="utf-8")


def _annotation(number: int, image_id: int, category_id: int, box: tuple[int, int, int, int]) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(box),
        "area": box[2] * box[3],
        "iscrowd": 0,
    }


def _manifest(work: Path, parameters: SceneParameters, coco: Mapping[str, Any]) -> dict[str, Any]:
    names = {category["id"]: category["name"] for category in coco["categories"]}
    counts = Counter(names[annotation["category_id"]] for annotation in coco["annotations"])
    return {
        "generator": GENERATOR_VERSION,
        "parameters": parameters.as_dict(),
        "sha256": checksum(work),
        "objects": len(coco["annotations"]),
        "groups": len({image["group"] for image in coco["images"]}),
        "class_counts": {label: counts[label] for label in names.values()},
    }


def _refuse_foreign(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and read_manifest(out) is None):
        raise DatasetError(
            f"expected an empty folder or an earlier demo set at {out}, got something else; choose another"
        )


def _install(work: Path, out: Path, parameters: SceneParameters) -> None:
    """Move the finished set into place; another process may have been faster with the same one."""
    if out.exists():
        if is_complete(out, parameters):
            return
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
        out.replace(old)
        shutil.rmtree(old, ignore_errors=True)
    work.replace(out)


def _generator(parameters: SceneParameters, *stream: int) -> np.random.Generator:
    """A generator of its own for every stream of numbers, family and seed."""
    family = int.from_bytes(hashlib.sha256(parameters.glyphs.encode()).digest()[:4], "big")
    return np.random.default_rng([parameters.seed, family, *stream])

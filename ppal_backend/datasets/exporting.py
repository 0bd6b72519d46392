"""A data set of boxes as files that other tools read: COCO, YOLO and Pascal VOC."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

from ppal_backend.datasets.coco import CocoAnnotation, CocoDataset, CocoImage
from ppal_backend.errors import DatasetError, ImageError

_LONGEST_STEM = 120
_UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")


@dataclass(frozen=True)
class BoxExport:
    """What is written.

    Args:
        dataset: Images, boxes and classes; ``file_name`` of an image is where it lies now.
        names: Image id -> file name in the export, as :func:`file_names` gives them.
        scores: Annotation id -> detector confidence in [0, 1]; empty for what people annotated.
    """

    dataset: CocoDataset
    names: Mapping[int, str]
    scores: Mapping[int, float] = field(default_factory=dict)


def file_names(dataset: CocoDataset, urls: Mapping[int, str | None]) -> dict[int, str]:
    """Name the images as their addresses do, with the suffix of the stored file.

    The eight digits that Label Studio puts before the name of an upload are left out.

    Args:
        dataset: The images to name.
        urls: Image id -> address in Label Studio.

    Returns:
        Image id -> a plain file name, no two alike without regard to case. Where two images have the same name, every
        name begins with the image's id.
    """
    stems = {image.id: _stem(urls.get(image.id) or "") for image in dataset.images}
    counts = Counter(stem.casefold() for stem in stems.values())
    if any(count > 1 for count in counts.values()):
        stems = {image_id: f"{image_id}-{stem}" for image_id, stem in stems.items()}
    return {image.id: stems[image.id] + Path(image.file_name).suffix for image in dataset.images}


def write_export(export: BoxExport, layout: str, folder: Path, with_images: bool = False) -> None:
    """Write the files of one layout; after an error the folder is as empty as it was.

    Args:
        export: What to write.
        layout: ``coco`` (``annotations.json``), ``yolo`` (``data.yaml``, ``labels``) or ``voc`` (``Annotations``).
        folder: A new or an empty folder.
        with_images: Copy the images too.

    Raises:
        DatasetError: The folder holds something, or there is no such layout.
        ImageError: An image is not where it was.
    """
    if layout not in LAYOUTS:
        raise DatasetError(f"expected a format of {', '.join(LAYOUTS)}, got {layout!r}; choose one of these")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DatasetError(f"expected a new or an empty folder, got {folder}, which holds files; choose another one")
    folder.mkdir(parents=True, exist_ok=True)
    write, images = LAYOUTS[layout]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
        write(export, Path(part))
        if with_images:
            _copy_images(export, Path(part) / images)
        for path in Path(part).iterdir():
            path.rename(folder / path.name)


def _copy_images(export: BoxExport, folder: Path) -> None:
    folder.mkdir()
    for image in export.dataset.images:
        try:
            shutil.copyfile(image.file_name, folder / export.names[image.id])
        except FileNotFoundError:
            raise ImageError(
                f"task {image.id}: expected its image in {image.file_name}, got no file; export without images, or run "
                "a round, which fetches it again"
            ) from None


def _write_coco(export: BoxExport, folder: Path) -> None:
    content = export.dataset.as_dict()
    content["images"] = [{**image, "file_name": export.names[image["id"]]} for image in content["images"]]
    if export.scores:
        content["annotations"] = [{**row, "score": export.scores[row["id"]]} for row in content["annotations"]]
    (folder / "annotations.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _write_yolo(export: BoxExport, folder: Path) -> None:
    class_index = {category_id: index for index, category_id in enumerate(_category_ids(export.dataset))}
    boxes = _by_image(export.dataset)
    (folder / "labels").mkdir()
    for image in export.dataset.images:
        lines = []
        for row in boxes[image.id]:
            x, y, w, h = row.bbox_xywh
            shares = ((x + w / 2) / image.width, (y + h / 2) / image.height, w / image.width, h / image.height)
            lines.append(f"{class_index[row.category_id]} " + " ".join(f"{share:.6f}" for share in shares) + "\n")
        path = folder / "labels" / f"{Path(export.names[image.id]).stem}.txt"
        path.write_text("".join(lines), encoding="utf-8")
    names = [f"  {index}: {json.dumps(label, ensure_ascii=False)}" for index, label in enumerate(export.dataset.labels)]
    head = [
        "# One set of images: split it before you train on it.",
        "train: images",
        "val: images",
        "names:",
    ]
    (folder / "data.yaml").write_text("\n".join([*head, *names]) + "\n", encoding="utf-8")


def _write_voc(export: BoxExport, folder: Path) -> None:
    labels = dict(zip(_category_ids(export.dataset), export.dataset.labels, strict=True))
    boxes = _by_image(export.dataset)
    (folder / "Annotations").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    stems = [Path(export.names[image.id]).stem for image in export.dataset.images]
    for image, stem in zip(export.dataset.images, stems, strict=True):
        root = _voc_element(image, export.names[image.id], [(labels[r.category_id], r) for r in boxes[image.id]])
        indent(root)
        ElementTree(root).write(folder / "Annotations" / f"{stem}.xml", encoding="utf-8")
    listed = "".join(f"{stem}\n" for stem in stems)
    (folder / "ImageSets" / "Main" / "all.txt").write_text(listed, encoding="utf-8")


LAYOUTS: dict[str, tuple[Callable[[BoxExport, Path], None], str]] = {
    "coco": (_write_coco, "images"),
    "yolo": (_write_yolo, "images"),
    "voc": (_write_voc, "JPEGImages"),
}
"""What writes each layout, and the folder of its images."""


def _voc_element(image: CocoImage, name: str, boxes: Sequence[tuple[str, CocoAnnotation]]) -> Element:
    """VOC counts pixels from 1, and a box holds both of its corner pixels."""
    root = Element("annotation")
    SubElement(root, "filename").text = name
    size = SubElement(root, "size")
    SubElement(size, "width").text = str(image.width)
    SubElement(size, "height").text = str(image.height)
    for label, row in boxes:
        item = SubElement(root, "object")
        SubElement(item, "name").text = label
        SubElement(item, "difficult").text = "0"
        box = SubElement(item, "bndbox")
        x, y, w, h = row.bbox_xywh
        x_min, x_max = _voc_span(x, x + w, image.width)
        y_min, y_max = _voc_span(y, y + h, image.height)
        for key, value in (("xmin", x_min), ("ymin", y_min), ("xmax", x_max), ("ymax", y_max)):
            SubElement(box, key).text = str(value)
    return root


def _voc_span(start: float, stop: float, size: int) -> tuple[int, int]:
    low = min(round(start) + 1, size)
    return low, min(max(round(stop), low), size)


def _by_image(dataset: CocoDataset) -> dict[int, list[CocoAnnotation]]:
    boxes: dict[int, list[CocoAnnotation]] = defaultdict(list)
    for row in dataset.annotations:
        boxes[row.image_id].append(row)
    return boxes


def _category_ids(dataset: CocoDataset) -> list[int]:
    return sorted(category.id for category in dataset.categories)


def _stem(url: str) -> str:
    parts = urlsplit(url)
    # Label Studio may lie below any path, and tasks may name it as people's browsers do.
    local = parse_qs(parts.query).get("d", [""])[0] if parts.path.rstrip("/").endswith("/data/local-files") else ""
    stem = PurePosixPath(local or unquote(parts.path)).stem
    if "/data/upload/" in parts.path:
        stem = _UPLOAD_PREFIX.sub("", stem)
    return _shortened(re.sub(r"[^\w.-]", "_", stem)).strip(".") or "image"


def _shortened(stem: str) -> str:
    """At most ``_LONGEST_STEM`` bytes of a name: file systems count bytes, and an id and a suffix come on top."""
    return stem.encode()[:_LONGEST_STEM].decode(errors="ignore")

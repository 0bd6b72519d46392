"""Pascal VOC: a ``VOCdevkit`` folder with XML annotations and image lists, as a COCO data set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from defusedxml import DefusedXmlException, ElementTree

from ppal_backend.datasets.coco import CocoAnnotation, CocoCategory, CocoDataset, CocoImage
from ppal_backend.datasets.ground_truth import clean, need_files
from ppal_backend.errors import DatasetError

LABELS = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def devkit(root: Path) -> Path:
    """The folder that holds ``VOC2007`` and so on: ``root`` itself or ``root/VOCdevkit``.

    Raises:
        DatasetError: Neither does.
    """
    for folder in (root, root / "VOCdevkit"):
        if any(folder.glob("VOC[0-9]*")):
            return folder
    raise DatasetError(f"expected VOC2007 or VOCdevkit/VOC2007 in {root}, got none; pass the folder of VOCdevkit")


def read_voc(root: Path, splits: Sequence[tuple[str, str]], labels: Sequence[str] = LABELS) -> CocoDataset:
    """Read some splits as one data set.

    Boxes go from VOC's pixel numbers (1-based, last pixel included) to x, y, width, height. Objects marked
    ``difficult`` become crowd regions: neither training nor evaluation counts them, as in VOC's own rules.

    Args:
        root: Folder of ``VOCdevkit`` or the folder that holds it.
        splits: Years and list names, such as ``("2007", "trainval")``.
        labels: Classes in the order of the class indices.

    Returns:
        Images numbered from 1 in the order of the lists, with absolute file names.

    Raises:
        DatasetError: A list, an annotation or an image is missing, an annotation cannot be read, or a class is
            unknown; the message names the file.
    """
    folder = devkit(Path(root))
    category_ids = {label: number for number, label in enumerate(labels, start=1)}
    images: list[CocoImage] = []
    annotations: list[CocoAnnotation] = []
    for year, name in splits:
        year_folder = folder / f"VOC{year}"
        for stem in _image_list(year_folder, name):
            image, boxes = _read_image(year_folder, stem, len(images) + 1, category_ids)
            images.append(image)
            for label, box, difficult in boxes:
                number = len(annotations) + 1
                annotations.append(CocoAnnotation(number, image.id, category_ids[label], box, int(difficult)))
    categories = tuple(CocoCategory(number, label) for label, number in category_ids.items())
    need_files([image.file_name for image in images])
    return clean(images, annotations, categories, str(folder), keep_crowd=True)[0]


Box = tuple[str, tuple[float, float, float, float], bool]


def _image_list(year_folder: Path, name: str) -> list[str]:
    """Names without suffix. A list of one class has 1, 0 or -1 behind each name; names themselves may hold spaces."""
    path = year_folder / "ImageSets" / "Main" / f"{name}.txt"
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except OSError:
        raise DatasetError(f"expected the image list {path}, got none; check the folder and the split") from None
    return [
        line if (year_folder / "Annotations" / f"{line}.xml").is_file() else re.sub(r"\s+-?[01]$", "", line)
        for line in lines
        if line
    ]


def _read_image(folder: Path, stem: str, number: int, category_ids: dict[str, int]) -> tuple[CocoImage, list[Box]]:
    path = folder / "Annotations" / f"{stem}.xml"
    try:
        root = ElementTree.parse(path).getroot()
    except OSError:
        raise DatasetError(f"expected the annotation {path}, got none; the image list names it") from None
    except (ElementTree.ParseError, DefusedXmlException, ValueError) as error:
        raise DatasetError(f"expected VOC XML in {path}, got broken text ({error}); fetch it again") from None
    width, height = (int(_number(root, f"size/{side}", path)) for side in ("width", "height"))
    picture = _picture(folder / "JPEGImages", stem, (root.findtext("filename") or "").strip())
    boxes = [_box(item, path) for item in root.findall("object")]
    unknown = sorted({label for label, _, _ in boxes} - set(category_ids))
    if unknown:
        raise DatasetError(
            f"{path}: expected classes among {sorted(category_ids)[:20]}, got {unknown[:5]}; pass all of yours with "
            "--classes a,b,c"
        )
    return CocoImage(number, str(picture.resolve()), width, height), boxes


def _picture(folder: Path, stem: str, file_name: str) -> Path:
    """The image of an annotation: of the same name and any usual suffix, else as the annotation's ``filename``."""
    names = [f"{stem}{suffix}" for suffix in (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".bmp", ".webp")]
    names += [Path(file_name.replace("\\", "/")).name] if file_name else []
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def _box(item: Element, path: Path) -> Box:
    """Corners in either order: a box drawn from right to left is a box."""
    label = (item.findtext("name") or "").strip()
    edges = [_number(item, f"bndbox/{edge}", path) for edge in ("xmin", "ymin", "xmax", "ymax")]
    left, right = sorted((edges[0], edges[2]))
    top, bottom = sorted((edges[1], edges[3]))
    box = (left - 1.0, top - 1.0, right - left + 1.0, bottom - top + 1.0)
    return label, box, (item.findtext("difficult") or "0").strip() == "1"


def _number(root: Element, name: str, path: Path) -> float:
    text = root.findtext(name)
    try:
        value = float(text) if text is not None else float("nan")
    except ValueError:
        value = float("nan")
    if value != value:
        raise DatasetError(f"{path}: expected a number in {name}, got {text!r}; correct the file")
    return value

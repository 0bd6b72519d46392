"""Backgrounds: crops of the photographs inside the scikit-image wheel (nothing is downloaded)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from ppal_backend.errors import DatasetError

# Name of the file in the wheel -> how often it is used. Textures and empty pictures are used less.
PHOTOGRAPHS: dict[str, float] = {
    "astronaut.png": 1.2,
    "brick.png": 0.8,
    "camera.png": 1.0,
    "chelsea.png": 1.2,
    "coffee.png": 1.5,
    "coins.png": 0.8,
    "grass.png": 1.0,
    "gravel.png": 0.8,
    "hubble_deep_field.jpg": 0.7,
    "ihc.png": 0.8,
    "moon.png": 0.6,
    "motorcycle_left.png": 1.6,
    "page.png": 0.6,
    "retina.jpg": 0.6,
    "rocket.jpg": 1.2,
    "text.png": 0.4,
}
_LONGEST = 640


@dataclass(frozen=True)
class Backdrop:
    """One view of a photograph. Lengths are shares: ``crop`` of the photograph's largest crop of the right aspect,
    ``centre`` (x, y in [0, 1]) of the room that the crop leaves, so that every value is a valid view."""

    photograph: str
    crop: float
    centre: tuple[float, float]
    mirrored: bool
    tint: tuple[float, float, float]
    brightness: float
    saturation: float
    blur: float


class Photographs:
    """The photographs, decoded once."""

    def __init__(self, pictures: dict[str, Image.Image]) -> None:
        self._pictures = pictures

    @classmethod
    def load(cls) -> Photographs:
        """Decode the photographs of the installed scikit-image.

        Raises:
            DatasetError: scikit-image is missing or one of its files is.
        """
        try:
            folder = Path(str(resources.files("skimage"))) / "data"
        except ModuleNotFoundError as error:
            raise DatasetError("expected scikit-image for the demo backgrounds, got none; pip install it") from error
        pictures = {}
        for name in PHOTOGRAPHS:
            if not (folder / name).is_file():
                raise DatasetError(f"expected {name} in {folder}, got no such file; install scikit-image 0.26")
            with Image.open(folder / name) as picture:
                pictures[name] = _prepared(picture)
        return cls(pictures)

    def render(self, backdrop: Backdrop, width: int, height: int) -> np.ndarray:
        """That view as float32 RGB [height, width, 3] in 0..255."""
        picture = self._pictures[backdrop.photograph]
        fit = min(picture.width / width, picture.height / height) * backdrop.crop
        crop_width, crop_height = width * fit, height * fit
        left = (picture.width - crop_width) * backdrop.centre[0]
        top = (picture.height - crop_height) * backdrop.centre[1]
        box = (left, top, left + crop_width, top + crop_height)
        view = picture.resize((width, height), Image.Resampling.BICUBIC, box=box)
        if backdrop.mirrored:
            view = ImageOps.mirror(view)
        if backdrop.blur > 0:
            view = view.filter(ImageFilter.GaussianBlur(backdrop.blur * min(width, height)))
        view = ImageEnhance.Color(view).enhance(backdrop.saturation)
        gains = np.asarray(backdrop.tint, dtype=np.float32) * np.float32(backdrop.brightness)
        return np.clip(np.asarray(view, dtype=np.float32) * gains, 0.0, 255.0)


def random_backdrop(rng: np.random.Generator) -> Backdrop:
    """Draw a view; grey photographs get a stronger tint, so that they do not all look alike."""
    names = tuple(PHOTOGRAPHS)
    weights = np.array([PHOTOGRAPHS[name] for name in names])
    warm, green = rng.normal(0.0, 0.09), rng.normal(0.0, 0.05)
    return Backdrop(
        photograph=names[int(rng.choice(len(names), p=weights / weights.sum()))],
        crop=float(rng.uniform(0.35, 0.95)),
        centre=(float(rng.uniform()), float(rng.uniform())),
        mirrored=bool(rng.random() < 0.5),
        tint=(float(1.0 + warm), float(1.0 + green), float(1.0 - warm)),
        brightness=float(rng.uniform(0.7, 1.15)),
        saturation=float(rng.uniform(0.5, 1.1)),
        blur=float(rng.uniform(0.004, 0.014)) if rng.random() < 0.35 else 0.0,
    )


def _prepared(picture: Image.Image) -> Image.Image:
    grey = picture.mode in ("L", "1", "I", "I;16")
    prepared = ImageOps.colorize(picture.convert("L"), "#0d1016", "#f4efe4") if grey else picture.convert("RGB")
    prepared.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
    return prepared

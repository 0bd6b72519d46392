"""A labeling config as the few facts that this package needs."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any
from xml.etree.ElementTree import Element, ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from ppal_backend.errors import LabelConfigError

CONTROL_TYPE = "rectanglelabels"
_EXAMPLE = (
    '<Image name="image" value="$image"/> <RectangleLabels name="label" toName="image"> '
    + '<Label value="Car"/> </RectangleLabels>'
)
_MAX_CHARS = 2_000_000
_EMPTY: Mapping[str, Any] = MappingProxyType({})
_VARIABLE = re.compile(r"\$([\w\[\].{}]+)", re.ASCII)


@dataclass(frozen=True)
class ImageAddress:
    """Where a task's image is, by an Image's value: resolved as Label Studio's editor does it (its ``parseValue``).

    Args:
        value: A key or path of the task's data (``$image``, ``$files.photo``, ``$photos[0]``), or text with such in it
            (``https://host/$folder/$file``). Letters of a to z, digits, ``_``, ``.`` and brackets belong to a key.
    """

    value: str

    @property
    def keys(self) -> str:
        """The keys of the task's data, as messages name them."""
        quoted = [repr(key[:80]) for key in dict.fromkeys(_VARIABLE.findall(self.value))]
        return " and ".join(filter(None, [", ".join(quoted[:-1]), *quoted[-1:]]))

    def url(self, data: Mapping[str, Any]) -> str | None:
        """Return the address by a task's data, None if a key is missing or holds no text (within text: or number)."""
        kinds = (str,) if _VARIABLE.fullmatch(self.value) else (str, int)
        found = {key: _value_at(data, key) for key in _VARIABLE.findall(self.value)}
        if any(type(value) not in kinds for value in found.values()):
            return None
        url = _VARIABLE.sub(lambda variable: str(found[variable[1]]), self.value)
        return url if url.strip() else None


@dataclass(frozen=True)
class LabelSchema:
    """What boxes may be drawn on which image of a task.

    Args:
        from_name: Name of the RectangleLabels control.
        to_name: Name of its Image.
        image: Where the image is, by a task's data.
        labels: Label strings as annotations hold them (a Label's alias where it has one), each once, in config order.
        predicted_values: Detector class name -> label, from the Labels' ``predicted_values``; of several labels that
            list a name, the first.
        class_names: Label -> the names that its ``predicted_values`` lists, for Labels that have the attribute.
        prompts: Label -> its attribute ``prompt``, for Labels that have one: what detectors with an open vocabulary
            look for.
        score_threshold: The control's ``model_score_threshold`` in [0, 1], or None.
        aliases: Displayed value -> label, for Labels that have an alias (older annotations may hold the value).
        label_thresholds: Label -> its own ``model_score_threshold``, where one is set.

    Raises:
        LabelConfigError: There are no labels.
    """

    from_name: str
    to_name: str
    image: ImageAddress
    labels: tuple[str, ...]
    predicted_values: Mapping[str, str] = field(default_factory=lambda: _EMPTY)
    score_threshold: float | None = None
    aliases: Mapping[str, str] = field(default_factory=lambda: _EMPTY)
    label_thresholds: Mapping[str, float] = field(default_factory=lambda: _EMPTY)
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _EMPTY)
    prompts: Mapping[str, str] = field(default_factory=lambda: _EMPTY)

    def __post_init__(self) -> None:
        if not self.labels:
            raise LabelConfigError(
                f"expected at least one <Label> in the RectangleLabels {self.from_name!r}, got none; add the classes"
            )

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.labels)

    def label(self, name: str) -> str | None:
        """Return the label that an annotation's string or a displayed value stands for, None if there is none."""
        if name in self._known:
            return name
        return self.aliases.get(name)

    @property
    def shown(self) -> dict[str, str]:
        """Label -> displayed value, for Labels that have an alias: what people read in the label's place."""
        shown: dict[str, str] = {}
        for value, label in self.aliases.items():
            shown.setdefault(label, value)
        return shown

    def label_of_class(self, class_name: str) -> str | None:
        """Return the label for a version's class name, None if there is none.

        A version's classes are labels of the project, so a label of the name comes before ``predicted_values``.
        """
        return self.label(class_name) or self.predicted_values.get(class_name)

    def threshold(self, label: str, default: float) -> float:
        """Return the least score of a pre-annotation of ``label``: the Label's, the control's, else ``default``."""
        own = self.label_thresholds.get(label, self.score_threshold)
        return default if own is None else own

    def shown_from(self, class_names: Sequence[str], default: float) -> list[float]:
        """Return the least score of a pre-annotation by class of a version; infinite for a class without a label."""
        named = [self.label_of_class(name) for name in class_names]
        return [math.inf if label is None else self.threshold(label, default) for label in named]


@lru_cache(maxsize=16)
def parse_label_config(xml: str, from_name: str | None = None) -> LabelSchema:
    """Read a labeling config; one that was read lately is not parsed again.

    Args:
        xml: The config as Label Studio stores it. Document types and entities are refused.
        from_name: The RectangleLabels control to use; None takes the first one that is on an Image.

    Raises:
        LabelConfigError: No such control on an Image, no labels, or no readable XML; the text says what to add.
    """
    root = _parse(xml)
    images = {_get(e, "name"): e for e in root.iter() if _tag(e) == "image" and _get(e, "name")}
    controls = [e for e in root.iter() if _tag(e) == CONTROL_TYPE]
    on_image = [(control, target) for control in controls if (target := _target(control, images)) is not None]
    if from_name is not None:
        on_image = [(control, target) for control, target in on_image if _get(control, "name") == from_name]
    if not on_image:
        raise LabelConfigError(_missing(root, controls, images, from_name))
    control, to_name = on_image[0]
    _refuse_several(root, control, images[to_name], images)
    return _schema(control, to_name, _image_address(images[to_name], to_name))


def _parse(xml: str) -> Element:
    if not isinstance(xml, str) or not xml.strip():
        raise LabelConfigError(f"expected a labeling config, got an empty one; set one such as <View>{_EXAMPLE}</View>")
    if len(xml) > _MAX_CHARS:
        raise LabelConfigError(f"expected a labeling config below {_MAX_CHARS} characters, got {len(xml)}; shorten it")
    if not xml.lstrip("\ufeff \t\r\n").startswith("<"):
        raise LabelConfigError(
            "expected a labeling config in XML tags, got an interface written as code or other text; use "
            f"<View>{_EXAMPLE}</View>"
        )
    try:
        root: Element = fromstring(xml, forbid_dtd=True)
    except DefusedXmlException:
        raise LabelConfigError(
            "expected a labeling config without document type and entities, got one with; remove <!DOCTYPE …>"
        ) from None
    except (ParseError, ValueError) as error:
        raise LabelConfigError(
            f"expected a labeling config in XML, got text that is none ({error}); correct it"
        ) from None
    return root


def _schema(control: Element, to_name: str, image: ImageAddress) -> LabelSchema:
    """What the Labels say; of several with the same name, as in Label Studio's editor, the first counts."""
    labels: dict[str, None] = {}
    aliases: dict[str, str] = {}
    predicted: dict[str, str] = {}
    class_names: dict[str, tuple[str, ...]] = {}
    thresholds: dict[str, float] = {}
    prompts: dict[str, str] = {}
    for element in control.iter():
        value = _get(element, "value")
        if _tag(element) != "label" or not value or value.startswith("$"):
            continue
        label = _get(element, "alias") or value
        if label != value:
            aliases.setdefault(value, label)
        if label in labels:
            continue
        labels[label] = None
        listed = _get(element, "predicted_values")
        if listed is not None:
            class_names[label] = tuple(dict.fromkeys(name.strip() for name in listed.split(",") if name.strip()))
            for name in class_names[label]:
                predicted.setdefault(name, label)
        if prompt := (_get(element, "prompt") or "").strip():
            prompts[label] = prompt
        own = _threshold(element)
        if own is not None:
            thresholds[label] = own
    return LabelSchema(
        from_name=_get(control, "name") or "",
        to_name=to_name,
        image=image,
        labels=tuple(labels),
        predicted_values=MappingProxyType(predicted),
        score_threshold=_threshold(control),
        aliases=MappingProxyType({value: label for value, label in aliases.items() if value not in labels}),
        label_thresholds=MappingProxyType(thresholds),
        class_names=MappingProxyType(class_names),
        prompts=MappingProxyType(prompts),
    )


def _target(control: Element, images: Mapping[str | None, Element]) -> str | None:
    names = [name.strip() for name in (_get(control, "toName") or "").split(",")]
    return next((name for name in names if _get(control, "name") and name in images), None)


def _refuse_several(root: Element, control: Element, image: Element, images: Collection[str | None]) -> None:
    """Refuse what makes several images or other labels out of each task: the backend knows one image and one set."""
    targets = _get(control, "toName") or ""
    if sum(name.strip() in images for name in targets.split(",")) > 1:
        raise LabelConfigError(
            f'expected one image a task, got <RectangleLabels toName="{targets[:80]}"> on several images; import every '
            "image as a task of its own"
        )
    for repeater in root.iter():
        if _tag(repeater) == "repeater" and any(e in (control, image) for e in repeater.iter()):
            raise LabelConfigError(
                "expected one image a task, got <RectangleLabels> or its <Image> inside a <Repeater>; import every "
                f"image as a task of its own and write {_EXAMPLE}"
            )
    if (_get(image, "valueList") or "").strip():
        raise LabelConfigError(
            "expected one image a task, got an <Image> with valueList; import every image as a task of its own and "
            'write value="$image"'
        )
    if (_get(control, "value") or "").strip().startswith("$"):
        raise LabelConfigError(
            f'expected at least one <Label> for the classes, got <RectangleLabels value="{_get(control, "value")}">, '
            'which takes them from each task; write them out, such as <Label value="Car"/>'
        )


def _image_address(image: Element, to_name: str) -> ImageAddress:
    value = (_get(image, "value") or "").strip()
    keys = _VARIABLE.findall(value)
    if not keys or any(brace in key for key in keys for brace in "{}"):
        raise LabelConfigError(
            f'expected <Image name="{to_name}" value="$…"> with the task data key of one image (letters a to z, '
            f'digits and _), got value={value[:80]!r}; write value="$image", or text with keys in it, such as '
            'value="https://host/$file"'
        )
    return ImageAddress(value)


def _value_at(data: Mapping[str, Any], path: str) -> object:
    """What stands under a key, else at a path such as ``files.photo`` or ``photos[0].url``; None if nothing does."""
    if path in data:
        return data[path]
    value: object = data
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        if key and isinstance(value, Mapping):
            value = value.get(key)
        elif index and isinstance(value, list) and int(index) < len(value):
            value = value[int(index)]
        else:
            return None
    return value


def _threshold(element: Element) -> float | None:
    text = _get(element, "model_score_threshold")
    if text is None or not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0.0 <= value <= 1.0:
        raise LabelConfigError(f"expected model_score_threshold between 0 and 1, got {text!r}; write for instance 0.3")
    return value


def _missing(
    root: Element, controls: list[Element], images: Mapping[str | None, Element], from_name: str | None
) -> str:
    names = [_get(control, "name") for control in controls]
    if from_name is not None and from_name not in names:
        found = f"no RectangleLabels of the name {from_name!r} (there is {', '.join(map(repr, names)) or 'none'})"
    elif any(_tag(e) == "video" for e in root.iter()) and not images:
        return "expected <RectangleLabels> on an <Image>, got <Video>, which is not supported; import frames as images"
    elif not controls:
        kinds = sorted({e.tag for e in root.iter() if _get(e, "toName")})
        found = f"only {', '.join(f'<{kind}>' for kind in kinds)}" if kinds else "no labeling control"
    elif not images:
        found = "<RectangleLabels> without an <Image>"
    else:
        target = _get(controls[0], "toName")
        found = f"<RectangleLabels toName={target!r}> that names none of {sorted(filter(None, images))}"
    return f"expected a <RectangleLabels> on an <Image>, got {found}; add {_EXAMPLE} or correct the names"


def _tag(element: Element) -> str:
    return element.tag.lower() if isinstance(element.tag, str) else ""


def _get(element: Element, name: str) -> str | None:
    if name in element.attrib:
        return element.attrib[name]
    wanted = name.lower()
    return next((value for key, value in element.attrib.items() if key.lower() == wanted), None)

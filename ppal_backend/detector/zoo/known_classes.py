"""Which labels of a project are classes that a detector's published weights know.

A label is known from the classes that its ``predicted_values`` names in the labeling config, else from the class of its
own name, else from the class that it is another word for. ``predicted_values=""`` says: from none.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Origin = Literal["predicted_values", "name", "synonym", "prompt"]
_RANK: dict[Origin, int] = {"predicted_values": 0, "name": 1, "synonym": 2, "prompt": 3}
_SHOWN = 12

COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""The 80 classes of COCO 2017 in the order of the class indices."""

_SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "person": ("human", "people", "pedestrian", "man", "woman", "child", "men", "women", "children"),
    "bicycle": ("bike", "pushbike", "pedal cycle"),
    "car": ("automobile", "motorcar", "passenger car"),
    "motorcycle": ("motorbike", "motor bike", "motor cycle"),
    "airplane": ("aeroplane", "plane", "aircraft", "jet", "airliner"),
    "bus": ("autobus", "omnibus"),
    "truck": ("lorry",),
    "boat": ("ship",),
    "traffic light": ("traffic signal", "stoplight", "stop light"),
    "fire hydrant": ("hydrant", "fire plug"),
    "cow": ("cattle", "bull", "ox", "oxen"),
    "horse": ("pony",),
    "sheep": ("lamb",),
    "cat": ("kitten", "kitty"),
    "dog": ("puppy",),
    "backpack": ("rucksack", "knapsack"),
    "handbag": ("purse",),
    "tie": ("necktie",),
    "suitcase": ("luggage", "trolley case"),
    "frisbee": ("flying disc",),
    "sports ball": ("ball", "football", "soccer ball", "basketball", "tennis ball", "volleyball"),
    "tennis racket": ("racket", "racquet", "tennis racquet"),
    "wine glass": ("wineglass",),
    "cup": ("mug",),
    "donut": ("doughnut",),
    "hot dog": ("hotdog",),
    "couch": ("sofa", "settee"),
    "potted plant": ("pottedplant", "houseplant", "house plant", "pot plant"),
    "dining table": ("diningtable",),
    "tv": ("television", "tv monitor", "tvmonitor", "telly"),
    "laptop": ("notebook computer", "laptop computer"),
    "mouse": ("computer mouse",),
    "remote": ("remote control",),
    "cell phone": ("cellphone", "mobile phone", "smartphone", "phone"),
    "refrigerator": ("fridge",),
    "microwave": ("microwave oven",),
    "teddy bear": ("teddy", "teddybear"),
    "hair drier": ("hair dryer", "hairdryer"),
    "bird": ("fowl",),
}


@dataclass(frozen=True)
class KnownClasses:
    """What a detector's weights know of a project's labels.

    Args:
        sources: Label -> names of the classes it is known from, for the labels that are known.
        origins: Label -> what tells so.
        unknown_names: Label -> names in its ``predicted_values`` that are no class of the weights.
        labels: All labels of the project.
        classes: Class names of the weights in the order of the class indices; () for an open vocabulary, where the
            names are prompts.
    """

    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    origins: Mapping[str, Origin] = field(default_factory=dict)
    unknown_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.sources)

    @property
    def plain(self) -> dict[str, list[str]]:
        """``sources``, ready for JSON: the label that a class's boxes bear comes first among those that share it."""
        ordered = sorted(self.sources, key=lambda label: _RANK[self.origins[label]])
        return {label: list(self.sources[label]) for label in ordered}

    def sentences(self) -> list[str]:
        """What people are told, a line for labels that are known from the same classes in the same way."""
        if self and not self.classes:
            asked = [name if name == label else f"{label} as `{name}`" for label, (name,) in self.sources.items()]
            return [f"it looks for what the labels say: {_some(asked)}"]
        groups: dict[tuple[tuple[str, ...], Origin], list[str]] = {}
        for label in self.plain:
            groups.setdefault((self.sources[label], self.origins[label]), []).append(label)
        how = {"predicted_values": "predicted_values", "name": "same name", "synonym": "another word for it"}
        lines = [
            f"{', '.join(labels)}: from {' and '.join(f'`{name}`' for name in names)} ({how[origin]})"
            for (names, origin), labels in groups.items()
        ]
        for name, bearing, others in self._shared():
            lines.append(
                f"boxes of `{name}` say {bearing}: a box bears one label, change it where it is {_either(others)}"
            )
        rest = [label for label in self.labels if label not in self.sources]
        if rest:
            lines.append(f"{_some(rest)}: trained from your first labels")
        for label, names in self.unknown_names.items():
            lines += [f"{label}: its predicted_values names {self._hint(name)}" for name in names]
        return lines

    def _shared(self) -> list[tuple[str, str, list[str]]]:
        """Classes that several labels are known from: with the label that boxes bear, and the others."""
        by_class: dict[str, list[str]] = {}
        for label, names in self.plain.items():
            for name in names:
                by_class.setdefault(name, []).append(label)
        return [(name, labels[0], labels[1:]) for name, labels in by_class.items() if len(labels) > 1]

    def _hint(self, name: str) -> str:
        close = difflib.get_close_matches(_plain(name), self.classes, n=1)
        meant = f"did you mean `{close[0]}`?" if close else f"it knows {_some(self.classes)}"
        return f"`{name[:40]}`, which is no class of the detector; {meant}"


def match_classes(
    labels: Sequence[str],
    predicted_values: Mapping[str, Sequence[str]],
    classes: Sequence[str],
    shown: Mapping[str, str] | None = None,
) -> KnownClasses:
    """Tell which labels are known from which classes.

    Case, ``_`` and ``-`` in place of blanks, and the plural do not matter.

    Args:
        labels: Labels of the project.
        predicted_values: Label -> the names that its attribute lists, for labels that have the attribute.
        classes: Class names of the weights.
        shown: Label -> what people read in its place, for labels that have an alias.
    """
    shown = shown or {}
    by_form: dict[str, str] = {}
    for words in ((lambda name: (name,)), (lambda name: _SYNONYMS.get(_plain(name), ()))):
        for name in classes:
            for word in words(name):
                for form in _forms(word):
                    by_form.setdefault(form, name)
    sources: dict[str, tuple[str, ...]] = {}
    origins: dict[str, Origin] = {}
    unknown: dict[str, tuple[str, ...]] = {}

    def find(word: str) -> str | None:
        if word in classes:
            return word
        return next((by_form[form] for form in _forms(word) if form in by_form), None)

    for label in labels:
        if label in predicted_values:
            named = [(name, find(name)) for name in predicted_values[label]]
            found = tuple(dict.fromkeys(known for _, known in named if known is not None))
            missing = tuple(name for name, known in named if known is None)
            if missing:
                unknown[label] = missing
            if found:
                sources[label], origins[label] = found, "predicted_values"
            if found or not named:
                continue
        for name in (label, shown.get(label, label)):
            own = find(name)
            if own is not None:
                same = bool(set(_forms(name)) & set(_forms(own)))
                sources[label], origins[label] = (own,), "name" if same else "synonym"
                break
    return KnownClasses(sources, origins, unknown, tuple(labels), tuple(classes))


def _plain(name: str) -> str:
    return re.sub(r"[\s_\-]+", " ", name).strip().casefold()


def _forms(name: str) -> list[str]:
    """A name and what it may be the plural of."""
    word = _plain(name)
    forms = [word]
    for ending, singulars in (("ies", ("y",)), ("ves", ("f", "fe")), ("es", ("",)), ("s", ("",))):
        if word.endswith(ending) and len(word) > len(ending) + 1 and not word.endswith("ss"):
            forms += [word.removesuffix(ending) + singular for singular in singulars]
    return forms


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"

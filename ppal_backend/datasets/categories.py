"""The only mapping between the three label spaces."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ppal_backend.errors import DatasetError


@dataclass(frozen=True)
class CategoryMap:
    """Labels in a fixed order: ``label`` <-> ``class_index`` 0..C-1 <-> COCO ``category_id`` 1..C.

    Args:
        labels: Label strings; their position is the class index.

    Raises:
        DatasetError: No label, an empty one, or one twice.
    """

    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        bad = [label for label in self.labels if not isinstance(label, str) or not label]
        if not self.labels or bad or len(set(self.labels)) != len(self.labels):
            raise DatasetError(f"expected distinct labels, at least one, got {list(self.labels)!r}; correct the list")

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {label: index for index, label in enumerate(self.labels)}

    def __contains__(self, label: object) -> bool:
        return label in self._index

    def class_index(self, label: str) -> int:
        """Return the class index (0..C-1) of a label.

        Raises:
            DatasetError: There is no such label.
        """
        try:
            return self._index[label]
        except KeyError:
            raise DatasetError(
                f"expected one of {list(self.labels)!r}, got label {label!r}; use a known label"
            ) from None

    def category_id(self, label: str) -> int:
        """Return the COCO category id (1..C) of a label."""
        return self.class_index(label) + 1

    def label(self, class_index: int) -> str:
        """Return the label of a class index (0..C-1).

        Raises:
            DatasetError: The index is out of range.
        """
        if not 0 <= class_index < len(self.labels):
            raise DatasetError(
                f"expected a class index in 0..{len(self) - 1}, got {class_index}; check the label space"
            )
        return self.labels[class_index]

    def coco_categories(self) -> list[dict[str, Any]]:
        """Return the COCO ``categories`` list."""
        return [{"id": index + 1, "name": label} for index, label in enumerate(self.labels)]

"""The three label spaces."""

from __future__ import annotations

import pytest

from ppal_backend.datasets.categories import CategoryMap
from ppal_backend.errors import DatasetError


def test_the_three_spaces_agree():
    names = CategoryMap(("cat", "dog", "eel"))
    assert [names.class_index(label) for label in names.labels] == [0, 1, 2]
    assert [names.category_id(label) for label in names.labels] == [1, 2, 3]
    assert [names.label(i) for i in range(3)] == ["cat", "dog", "eel"]
    assert len(names) == 3
    assert "dog" in names
    assert "Dog" not in names
    assert names.coco_categories() == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "eel"}]


@pytest.mark.parametrize("labels", [(), ("a", "a"), ("a", ""), (1,)])
def test_bad_lists(labels):
    with pytest.raises(DatasetError, match="distinct labels"):
        CategoryMap(labels)


def test_out_of_range_never_wraps_around():
    names = CategoryMap(("a", "b"))
    for call, value in ((names.label, -1), (names.label, 2), (names.class_index, "c")):
        with pytest.raises(DatasetError, match="expected"):
            call(value)

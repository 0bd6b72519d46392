"""COCO files of users: cleaned with a count, or refused with the reason; splits never cut a group."""

import json
from collections import Counter

import pytest
from PIL import Image

from ppal_backend.datasets.ground_truth import read_user_coco, split
from ppal_backend.errors import DatasetError
from ppal_backend.synthetic.scenes import generate


def write(folder, **changes):
    """A COCO file of two 40 x 30 images with one good box each; ``changes`` replace its parts."""
    (folder / "images").mkdir(exist_ok=True)
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (40, 30)).save(folder / "images" / name)
    coco = {
        "images": [
            {"id": 1, "file_name": "a.jpg", "width": 40, "height": 30},
            {"id": 2, "file_name": "b.jpg", "width": 40, "height": 30},
        ],
        "annotations": [box(1, [2, 3, 10, 5], category_id=7), box(2, [0, 0, 40, 30], category_id=9)],
        "categories": [{"id": 9, "name": "dog"}, {"id": 7, "name": "cat"}],
    }
    coco.update(changes)
    path = folder / "coco.json"
    path.write_text(json.dumps(coco))
    return path


def box(image_id, bbox, **more):
    box.last = getattr(box, "last", 0) + 1
    return {"id": box.last, "image_id": image_id, "category_id": 7, "bbox": bbox, **more}


def test_a_good_file_is_read_whole(tmp_path):
    truth = read_user_coco(write(tmp_path))
    assert truth.labels == ("cat", "dog")
    assert truth.truths()[1].boxes == (("cat", 2, 3, 10, 5),)
    assert truth.truths()[2].boxes == (("dog", 0, 0, 40, 30),)
    assert truth.paths()[1] == (tmp_path / "images" / "a.jpg").resolve()
    assert truth.report.dropped == 0 and truth.report.clipped == 0


def test_truth_by_path_joins_size_and_boxes(tmp_path):
    truth = read_user_coco(write(tmp_path)).truths_by_path()[(tmp_path / "images" / "b.jpg").resolve()]
    assert (truth.width, truth.height, truth.boxes) == (40, 30, (("dog", 0, 0, 40, 30),))


def test_bad_boxes_are_dropped_and_counted(tmp_path):
    rows = [
        box(1, [1, 1, 5, 5]),
        box(1, [1, 1, 0, 5]),
        box(1, [1, 1, 5, -2]),
        box(1, [1, 1, float("nan"), 5]),
        box(1, [1, 2, 3]),
        box(1, [50, 1, 5, 5]),
        box(1, [1, 1, 5, 5], iscrowd=1),
        box(1, [35, 25, 10, 10]),
    ]
    truth = read_user_coco(write(tmp_path, annotations=rows))
    report = truth.report
    assert (report.degenerate, report.outside, report.crowd, report.clipped) == (4, 1, 1, 1)
    assert truth.truths()[1].boxes == (("cat", 1, 1, 5, 5), ("cat", 35, 25, 5, 5))
    assert truth.truths()[2].boxes == ()
    assert "4 degenerate" in str(report)


def test_images_may_lie_elsewhere(tmp_path):
    path = write(tmp_path)
    (tmp_path / "images").rename(tmp_path / "photos")
    assert len(read_user_coco(path, tmp_path / "photos").paths()) == 2
    with pytest.raises(DatasetError, match=r"2 missing, such as .*a\.jpg"):
        read_user_coco(path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"annotations": [box(1, [1, 1, 2, 2], category_id=8)]}, "listed category, got category_id 8"),
        ({"annotations": [box(5, [1, 1, 2, 2])]}, "listed image, got image_id 5"),
        ({"annotations": [{"bbox": [1, 1, 2, 2]}]}, r"annotations\[0\].*image_id"),
        ({"annotations": None}, "list 'annotations'"),
        ({"images": []}, "images"),
        (
            {"images": [{"id": 1, "file_name": "a.jpg", "width": "wide", "height": 3}]},
            r"images\[0\].width to be int or float, got 'wide'",
        ),
        ({"images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}] * 2}, "again"),
        ({"categories": []}, "category"),
        ({"categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "cat"}]}, "cat"),
        ({"categories": [{"id": 7, "name": "cat"}, {"id": 7, "name": "dog"}], "annotations": []}, "7"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(tmp_path, changes, reason):
    with pytest.raises(DatasetError, match=reason):
        read_user_coco(write(tmp_path, **changes))


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\x01"])
def test_files_that_are_not_coco(tmp_path, content):
    (tmp_path / "coco.json").write_text(content)
    with pytest.raises(DatasetError, match="expected"):
        read_user_coco(tmp_path / "coco.json")


def test_a_missing_file(tmp_path):
    with pytest.raises(DatasetError, match="check the path"):
        read_user_coco(tmp_path / "coco.json")


def test_pictures_that_cannot_be_opened_are_told_together(tmp_path):
    path = write(tmp_path)
    (tmp_path / "images" / "a.jpg").write_bytes(b"")
    (tmp_path / "images" / "b.jpg").write_text("<html>not found</html>")
    with pytest.raises(
        DatasetError, match=r"coco.json: expected 2 pictures, got 2 files .*a\.jpg.*b\.jpg.*take them out"
    ):
        read_user_coco(path)


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    out = tmp_path_factory.mktemp("truth") / "demo"
    generate(out, 150, 3, size=48)
    return read_user_coco(out)


def test_a_generated_set_is_clean_and_keeps_groups(generated):
    assert generated.report.dropped == 0 and generated.report.clipped == 0
    assert set(generated.groups) == set(generated.scenes) == set(generated.dataset.image_ids)


@pytest.mark.parametrize("seed", range(5))
def test_a_split_has_the_sizes_asked_for_and_cuts_no_group(generated, seed):
    parts = split(generated, {"pool": 100, "test": 45}, seed=seed)
    assert {name: len(part.dataset.images) for name, part in parts.items()} == {"pool": 100, "test": 45}
    groups = {name: {generated.groups[i] for i in part.dataset.image_ids} for name, part in parts.items()}
    assert not groups["pool"] & groups["test"]
    sizes = Counter(generated.groups.values())
    assert any(sizes[group] > 1 for group in groups["test"])


def test_a_split_depends_on_its_seed_only(generated):
    def ids(seed):
        return split(generated, {"pool": 100, "test": 45}, seed=seed)["test"].dataset.image_ids

    assert ids(1) == ids(1) != ids(2)


def test_a_split_that_cannot_be_filled_is_refused(generated):
    with pytest.raises(DatasetError, match="within 150"):
        split(generated, {"pool": 140, "test": 45})


def test_groups_that_do_not_fit_are_told(tmp_path):
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 4, "height": 4, "group": n // 4} for n in range(8)]
    for image in images:
        Image.new("RGB", (4, 4)).save(tmp_path / image["file_name"])
    path = tmp_path / "coco.json"
    path.write_text(json.dumps({"images": images, "annotations": [], "categories": [{"id": 1, "name": "x"}]}))
    with pytest.raises(DatasetError, match="short"):
        split(read_user_coco(path), {"pool": 5, "test": 3})

"""Several people on one task: what is learned of it, and where they differ, against a slow rule."""

import itertools
import random
from collections import Counter
from pathlib import Path
from statistics import median

import pytest

from ppal_backend.datasets.consensus import Vote, consensus_of, disagreement_of, groups_of
from ppal_backend.datasets.images import ImageInfo
from ppal_backend.datasets.label_studio_json import annotations_to_coco, people_of
from ppal_backend.label_studio.schema import parse_label_config
from tests.service.conftest import CONFIG

SCHEMA = parse_label_config(CONFIG)
IMAGE = {1: ImageInfo(1, Path("1.jpg"), 100, 100), 2: ImageInfo(2, Path("2.jpg"), 100, 100)}


def annotation(person, *boxes, number=1, **changes):
    """``boxes`` are (label, x, y, width, height) in percent, which are pixels here."""
    result = [
        {"type": "rectanglelabels", "from_name": "label", "to_name": "image",
         "value": {"x": x, "y": y, "width": w, "height": h, "rotation": 0, "rectanglelabels": [label]}}
        for label, x, y, w, h in boxes
    ]  # fmt: skip
    made = f"2026-01-01T00:00:{number:02d}.000000Z"
    return {
        "id": number,
        "completed_by": person,
        "was_cancelled": False,
        "updated_at": made,
        "result": result,
        **changes,
    }


def learned(*annotations, task_id=1):
    dataset, report = annotations_to_coco([{"id": task_id, "annotations": list(annotations)}], SCHEMA, IMAGE)
    names = {category.id: category.name for category in dataset.categories}
    return [(names[a.category_id], *map(round, a.bbox_xywh)) for a in dataset.annotations], report


CAT, CAT_2, CAT_3 = ("Cat", 10, 10, 40, 40), ("Cat", 12, 10, 40, 40), ("Cat", 20, 10, 40, 40)
DOG = ("Dog", 60, 60, 30, 30)


def test_three_people_two_of_whom_agree():
    boxes, report = learned(annotation(1, CAT, DOG), annotation(2, CAT_2, number=2), annotation(3, CAT_3, number=3))
    assert boxes == [("Cat", 12, 10, 40, 40)], "the median of three, and no dog: one of three saw it"
    assert report.agreed == 1


def test_the_label_is_that_of_most_and_the_corners_are_theirs():
    dog = ("Dog", 14, 10, 40, 40)
    boxes, _ = learned(
        annotation(1, CAT), annotation(2, dog, number=2), annotation(3, ("Dog", 16, 10, 40, 40), number=3)
    )
    assert boxes == [("Dog", 15, 10, 40, 40)]


def test_of_two_people_both_count_and_the_later_label_wins():
    boxes, _ = learned(annotation(1, CAT, DOG, number=2), annotation(2, ("Dog", 10, 10, 40, 40), number=3))
    assert sorted(boxes) == [("Dog", 10, 10, 40, 40), ("Dog", 60, 60, 30, 30)]
    boxes, _ = learned(annotation(1, CAT, number=5), annotation(2, ("Dog", 10, 10, 40, 40), number=3))
    assert boxes == [("Cat", 10, 10, 40, 40)]


def test_a_ground_truth_goes_before_all_votes():
    truth = annotation(3, DOG, number=1, ground_truth=True)
    boxes, report = learned(truth, annotation(1, CAT, number=2), annotation(2, CAT, number=3))
    assert (boxes, report.agreed) == ([DOG], 0)


def test_of_several_ground_truths_most_count():
    """Label Studio makes every imported annotation a ground truth: of an imported set with three people's boxes only
    one person's were learned."""
    three = [annotation(i, box, number=i, ground_truth=True) for i, box in enumerate((CAT, CAT_2, DOG), start=1)]
    boxes, report = learned(*three, annotation(4, DOG, number=9), annotation(5, DOG, number=10))
    assert (boxes, report.agreed) == ([("Cat", 11, 10, 40, 40)], 1)


def test_one_person_has_one_vote_and_it_is_the_last_one():
    boxes, report = learned(
        annotation(1, CAT), annotation(1, DOG, number=2), annotation(1, CAT, number=3, was_cancelled=True)
    )
    assert (boxes, report.agreed) == ([DOG], 0)
    boxes, _ = learned(annotation(1, CAT), annotation(1, DOG, number=2), annotation({"id": 2}, DOG, number=3))
    assert boxes == [DOG]


def test_most_people_saw_nothing():
    boxes, report = learned(annotation(1, CAT), annotation(2, number=2), annotation(3, number=3))
    assert (boxes, report.negatives) == ([], 1)


def test_two_objects_of_one_person_are_never_one():
    near = ("Cat", 16, 10, 40, 40)  # both boxes of a person overlap the other's
    boxes, _ = learned(annotation(1, CAT, near), annotation(2, CAT, near, number=2))
    assert sorted(boxes) == sorted([CAT, near])


def test_who_differs_from_whom():
    tasks = [
        {"id": 1, "annotations": [annotation(7, CAT, DOG), annotation(8, CAT_2, number=2)]},
        {"id": 2, "annotations": [annotation(7, CAT), annotation(8, ("Dog", 10, 10, 40, 40), number=2),
                                  annotation(9, CAT, number=3, ground_truth=True)]},
        {"id": 3, "annotations": [annotation(7, CAT), annotation(8, CAT, number=2)]},
        {"id": 2, "annotations": [annotation(7, CAT)]},
    ]  # fmt: skip
    report = people_of(tasks, SCHEMA, IMAGE)
    assert report["tasks"] == 2, "task 3 has no image, the last one is by one person"
    assert report["worst"] == [
        {"task": 2, "agreement": pytest.approx(1 / 3, abs=1e-4), "people": [7, 8, 9]},
        {"task": 1, "agreement": pytest.approx(2 / 3, abs=1e-4), "people": [7, 8]},
    ]
    assert report["by_task"] == [[1, pytest.approx(2 / 3, abs=1e-4)], [2, pytest.approx(1 / 3, abs=1e-4)]]
    assert report["classes"] == {
        "Cat": {"same": 4, "other_label": 2, "alone": 0}, "Dog": {"same": 0, "other_label": 2, "alone": 1},
    }  # fmt: skip
    assert report["pairs"] == [
        {"people": [7, 8], "tasks": 2, "same": 2, "other_label": 2, "alone": 1},
        {"people": [7, 9], "tasks": 1, "same": 2, "other_label": 0, "alone": 0},
        {"people": [8, 9], "tasks": 1, "same": 0, "other_label": 2, "alone": 0},
    ]
    assert people_of([], SCHEMA, IMAGE) == {}


def test_every_task_is_told_however_many_there_are():
    votes = [Vote(person, (0.0, 0.0, 10.0, 10.0), "Cat") for person in (1, 2)]
    report = disagreement_of((task_id, [1, 2], votes) for task_id in range(6000))
    assert report["by_task"] == [[task_id, 1.0] for task_id in range(6000)]


# The rule once more, slowly: again and again the best pair of groups that may be joined.


def slow_overlap(a, b):
    inner = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return inner / (sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - inner)


def slow_groups(votes):
    groups = [frozenset([number]) for number in range(len(votes))]
    while True:
        best = None
        for ours, theirs in itertools.combinations(groups, 2):
            people = [votes[k].person for k in ours | theirs]
            overlaps = {(i, j): slow_overlap(votes[i].box_xyxy, votes[j].box_xyxy) for i in ours for j in theirs}
            if len(set(people)) < len(people) or min(overlaps.values()) < 0.5:
                continue
            for (i, j), overlap in overlaps.items():
                key = (votes[i].label != votes[j].label, -overlap, min(i, j), max(i, j))
                if best is None or key < best[0]:
                    best = key, ours, theirs
        if best is None:
            return sorted(sorted(group) for group in groups)
        groups = [group for group in groups if group not in best[1:]] + [best[1] | best[2]]


def slow_consensus(votes, people):
    found = []
    for members in slow_groups(votes):
        if len(members) >= people / 2:
            by_label = Counter(votes[k].label for k in members)
            most = [label for label, n in by_label.items() if n == max(by_label.values())]
            label = max(most, key=lambda name: max(votes[k].rank for k in members if votes[k].label == name))
            kept = [votes[k].box_xyxy for k in members if votes[k].label == label]
            found.append((label, tuple(median(box[side] for box in kept) for side in range(4))))
    return found


@pytest.mark.parametrize("seed", range(60))
def test_groups_and_consensus_are_those_of_the_slow_rule(seed):
    rng = random.Random(seed)
    people = rng.randint(1, 5)
    votes = []
    for _ in range(rng.randint(0, 5)):
        x, y, side = rng.uniform(0, 60), rng.uniform(0, 60), rng.uniform(15, 40)
        for person in range(people):
            for _ in range(rng.choice([0, 1, 1, 1, 2])):
                dx, dy, grow = rng.gauss(0, 4), rng.gauss(0, 4), rng.gauss(0, 3)
                box = (x + dx, y + dy, x + dx + side + grow, y + dy + side + grow)
                votes.append(Vote(person, box, rng.choice(["Cat", "Cat", "Dog"]), rank=person))
    rng.shuffle(votes)
    where = {id(vote): number for number, vote in enumerate(votes)}
    groups = groups_of(votes)
    assert [sorted(where[id(vote)] for vote in members) for members in groups] == slow_groups(votes)
    assert all(len({vote.person for vote in members}) == len(members) for members in groups)
    assert consensus_of(votes, people) == slow_consensus(votes, people)


@pytest.mark.parametrize("seed", range(20))
def test_disagreement_counts_every_box_of_every_pair_once(seed):
    rng = random.Random(seed)
    votes = [
        Vote(person, (x, 0.0, x + 10.0, 10.0), rng.choice("ab"))
        for person in range(3)
        for x in rng.sample(range(0, 100, 20), rng.randint(0, 5))
    ]
    report = disagreement_of([(5, [0, 1, 2], votes)])
    by_hand = {}
    for two in itertools.combinations(range(3), 2):
        count = Counter(same=0, other_label=0, alone=0)
        for vote in (v for v in votes if v.person in two):
            twins = [v for v in votes if v.person in two and v.person != vote.person and v.box_xyxy == vote.box_xyxy]
            count["alone" if not twins else "same" if twins[0].label == vote.label else "other_label"] += 1
        by_hand[two] = count
    assert {
        tuple(p["people"]): Counter({k: p[k] for k in ("same", "other_label", "alone")}) for p in report["pairs"]
    } == by_hand
    shares = [c["same"] / sum(c.values()) if sum(c.values()) else 1.0 for c in by_hand.values()]
    assert report["worst"][0]["agreement"] == pytest.approx(sum(shares) / 3, abs=1e-4)

"""Pins and quotas in the database."""

import pytest

from ppal_backend.errors import StateError
from ppal_backend.store.steering import MOST_PINS, MOST_QUOTAS, ProjectSteering
from ppal_backend.structures.steering import Quota, Steering


@pytest.fixture
def steering(store):
    for number in (1, 2):
        store.projects.connect(number, f"{number}.1", "<View/>", "http://ls", {})
    return store.steering


def test_pins_keep_their_order_move_and_go(steering):
    assert steering.of_project(1) == Steering()
    steering.pin(1, [7, 5], "first")
    steering.pin(1, [9], "first")
    steering.pin(1, [5, 3], "last")
    steering.pin(2, [7], "last")
    assert steering.of_project(1) == Steering((7, 9), (5, 3))
    assert steering.unpin(1, [9, 3, 100]) == 2
    assert steering.of_project(1) == Steering((7,), (5,)) and steering.of_project(2) == Steering((), (7,))


def test_a_quota_on_the_same_takes_the_place_of_the_earlier_one(steering):
    first = steering.add_quota(1, Quota("label", "cat", 0.3))
    other = steering.add_quota(1, Quota("data", "north", 0.2, "camera"))
    again = steering.add_quota(1, Quota("label", "cat", 0.5))
    assert first.id == again.id != other.id
    assert steering.of_project(1).quotas == (Quota("label", "cat", 0.5, "", first.id), other)
    assert steering.remove_quota(1, first.id) and not steering.remove_quota(1, first.id)
    assert not steering.remove_quota(2, other.id), "a quota of another project"
    assert steering.of_project(1).quotas == (other,)


def test_both_are_bounded_and_need_a_project(steering):
    steering.pin(1, range(1, MOST_PINS + 1), "first")
    with pytest.raises(StateError, match=f"at most {MOST_PINS} pinned tasks, got {MOST_PINS + 1}"):
        steering.pin(1, [MOST_PINS + 1], "last")
    steering.pin(1, [1], "last")
    assert len(steering.of_project(1).first) == MOST_PINS - 1, "a refused pin must change nothing"
    for number in range(MOST_QUOTAS):
        steering.add_quota(1, Quota("label", str(number), 0.1))
    with pytest.raises(StateError, match=f"at most {MOST_QUOTAS} quotas"):
        steering.add_quota(1, Quota("label", "one more", 0.1))
    for call in (lambda: steering.pin(3, [1], "first"), lambda: steering.add_quota(3, Quota("label", "a", 0.1))):
        with pytest.raises(StateError, match="not connected"):
            call()


def test_a_round_drops_pins_that_need_none_any_more(steering):
    steering.pin(1, [1, 2, 3], "first")
    mine = ProjectSteering(steering, 1)
    before = mine.read().pinned_at
    steering.pin(1, [3], "last")
    mine.drop({2: before[2], 3: before[3]})
    assert (mine.read().first, mine.read().last) == ((1,), (3,)), "a pin that was set anew is another one"


def test_another_project_with_the_same_id_starts_without_them(steering, store):
    steering.pin(1, [1], "first")
    steering.add_quota(1, Quota("label", "a", 0.1))
    store.projects.connect(1, "1.2", "<View/>", "http://ls", {})
    assert steering.of_project(1) == Steering()

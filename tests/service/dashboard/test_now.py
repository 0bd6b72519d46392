"""The step line and its time left."""

from datetime import datetime, timedelta

import pytest

from ppal_backend.rounds.run import AS_IS_STEPS, RANK_STEPS, TRAIN_STEPS
from ppal_backend.service.dashboard.now import IN_WORDS, left_s, step_line, steps_of, usual_seconds
from ppal_backend.service.dashboard.project import StepMark
from ppal_backend.store import RoundRecord

START = datetime(2026, 1, 1, 12, 0, 0)
USUAL = {"export": 1, "dataset": 2, "train": 100, "evaluate": 5, "infer": 20, "candidates": 1, "query": 2, "publish": 3}


def record(state="running", kind="train", step="train", progress=None, metrics=None, attempts=1):
    return RoundRecord(
        1, 1, 1, kind, state, "", attempts, 0, "", step, progress or {}, metrics or {}, False, START, START, None
    )


def marks(**ended):
    return {name: StepMark(1.5, START + timedelta(seconds=s), {}) for name, s in ended.items()}


def test_steps_are_those_that_rounds_run():
    assert steps_of("train") == TRAIN_STEPS and steps_of("rank") == RANK_STEPS
    assert steps_of("rank", as_is=True) == AS_IS_STEPS
    assert set(IN_WORDS) == {*TRAIN_STEPS, *AS_IS_STEPS}


def test_progress_tells_the_rest_of_a_step_and_the_last_round_the_rest_of_the_line():
    running = record(progress={"done": 25, "total": 100, "detail": "loss 0.5"})
    line = step_line(running, marks(export=4, dataset=10), USUAL, START + timedelta(seconds=40))
    assert [s.state for s in line] == ["done"] * 2 + ["running"] + ["waiting"] * 5
    train = line[2]
    assert (train.done, train.total, train.detail, train.seconds) == (25, 100, "loss 0.5", 30.0)
    assert train.left_s == pytest.approx(90.0), "30 s for 25 of 100"
    assert left_s(line) == pytest.approx(90 + 5 + 20 + 1 + 2 + 3)


def test_without_progress_the_last_round_tells_and_without_one_nobody_does():
    at = START + timedelta(seconds=40)
    line = step_line(record(), marks(export=4, dataset=10), USUAL, at)
    assert line[2].left_s == pytest.approx(70.0)
    late = step_line(record(), marks(export=4, dataset=10), USUAL, at + timedelta(hours=1))
    assert late[2].left_s == 0.0
    assert left_s(step_line(record(), {}, {}, at)) is None


def test_an_interrupted_step_is_not_measured_by_the_time_since_it_began():
    again = record(progress={"done": 25, "total": 100}, attempts=2)
    at = START + timedelta(hours=5)
    assert step_line(again, marks(export=4, dataset=10), USUAL, at)[2].left_s == pytest.approx(75.0)
    assert step_line(again, marks(export=4, dataset=10), {}, at)[2].left_s is None


def test_a_waiting_round_takes_as_long_as_the_last():
    line = step_line(record(state="pending", step=""), {}, USUAL, START)
    assert {s.state for s in line} == {"waiting"} and left_s(line) == sum(USUAL.values())


def test_usual_is_the_last_complete_round_of_the_same_kind():
    rounds = [
        record(state="done", metrics={"seconds": {"train": 1.0}}),
        record(state="done", metrics={"seconds": {"train": 7.0}}),
        record(state="done", kind="rank", metrics={"seconds": {"infer": 3.0}}),
        record(state="failed"),
    ]
    assert usual_seconds(rounds, "train") == {"train": 7.0} and usual_seconds(rounds, "rank") == {"infer": 3.0}
    assert usual_seconds([], "train") == {}

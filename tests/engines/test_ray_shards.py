"""Shards and the processes that do them, on a cluster that is played: no Ray is needed here."""

import itertools
from types import SimpleNamespace

import pytest

from ppal_backend.engines.ray import tasks
from ppal_backend.engines.ray.tasks import RETRIES, ShardRun, cut
from ppal_backend.errors import CheckpointError, DetectorError, RoundCancelled


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class PlayedProcess:
    def __init__(self, ray, number):
        self.number = number
        self.load = SimpleNamespace(remote=lambda: ray.call(number, None))
        self.work = SimpleNamespace(remote=lambda shard: ray.call(number, shard))


class PlayedRay:
    """Answers come in the order that ``pick`` chooses; ``fate`` says what becomes of a call: None, or an error.

    ``fate(process number, shard)`` is called with None for the shard when a process loads.
    """

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, fate=lambda process, shard: None, pick=min):
        self.fate, self.pick = fate, pick
        self.hired, self.killed, self.done, self.most = 0, [], [], 0
        self._answers, self._numbers = {}, itertools.count()

    def hire(self):
        process = PlayedProcess(self, self.hired)
        self.hired += 1
        return process

    def call(self, process, shard):
        answer = next(self._numbers)
        self._answers[answer] = (process, shard)
        return answer

    def wait(self, answers, timeout):
        assert answers, "nobody is waited for"
        self.most = max(self.most, len(answers))
        return [self.pick(answers)], []

    def get(self, answer):
        process, shard = self._answers.pop(answer)
        error = self.fate(process, shard)
        if error is not None:
            raise error
        if shard is not None:
            self.done.append(shard)
        return None if shard is None else f"result of {shard}"

    def kill(self, process):
        self.killed.append(process.number)


def run(ray, shards=6, places=3, should_stop=lambda: False):
    return ShardRun(ray, ray.hire, list(range(shards)), lambda: places, should_stop).results()


def results(shards=6):
    return [f"result of {n}" for n in range(shards)]


@pytest.mark.parametrize("pick", [min, max])
def test_results_come_in_order_whoever_is_first(pick):
    ray = PlayedRay(pick=pick)
    assert list(run(ray)) == results()
    assert sorted(ray.done) == list(range(6)) and ray.hired == 3 and sorted(ray.killed) == [0, 1, 2]


def test_no_more_processes_than_shards():
    ray = PlayedRay()
    assert list(run(ray, shards=2, places=8)) == results(2) and ray.hired == 2


def test_a_lost_process_costs_its_shard_alone():
    lost = []

    def fate(process, shard):
        if shard == 2 and not lost:
            lost.append(process)
            return RayError("its node died")

    ray = PlayedRay(fate)
    assert list(run(ray)) == results()
    assert sorted(ray.done) == list(range(6)), "no shard but the lost one is done twice, and that one once"
    assert ray.hired == 4 and lost[0] in ray.killed, "another took its place"


def test_a_shard_that_takes_every_process_with_it_ends_the_work():
    ray = PlayedRay(lambda process, shard: RayError("killed for memory\nmore") if shard == 3 else None)
    with pytest.raises(DetectorError, match=r"shard 4 of 6 .*4 processes that were lost with it \(killed for memory\)"):
        list(run(ray))
    assert set(ray.killed) == set(range(ray.hired)), "none is left behind"


def test_processes_that_cannot_start_end_the_work():
    ray = PlayedRay(lambda process, shard: RayError("no such module"))
    with pytest.raises(DetectorError, match=r"expected processes to start .*\(no such module\)"):
        list(run(ray, places=2))
    assert ray.hired <= 2 * (1 + RETRIES)


def test_a_node_where_nothing_starts_does_not_end_the_work_of_others():
    ray = PlayedRay(lambda process, shard: RayError("no such module") if process and shard is None else None)
    assert list(run(ray, places=2)) == results()
    assert ray.hired <= 2 + RETRIES + 6


def test_what_a_process_says_on_purpose_arrives_as_it_was_said():
    said = CheckpointError("the checkpoint is damaged")
    ray = PlayedRay(lambda process, shard: RayTaskError(said))
    with pytest.raises(CheckpointError) as raised:
        list(run(ray))
    assert raised.value is said and sorted(ray.killed) == [0, 1, 2]


def test_a_bug_is_not_taken_for_a_lost_process():
    ray = PlayedRay(lambda process, shard: RayTaskError(KeyError("bug")) if shard == 1 else None)
    with pytest.raises(RayTaskError, match="bug"):
        list(run(ray))
    assert ray.hired == 3


def test_a_stop_ends_all_processes():
    ray, seen = PlayedRay(), []
    with pytest.raises(RoundCancelled):
        for result in run(ray, should_stop=lambda: len(seen) >= 2):
            seen.append(result)
    assert seen == results()[: len(seen)] and 2 <= len(seen) < 6 and sorted(ray.killed) == [0, 1, 2]


def test_results_left_behind_end_the_processes_too():
    ray = PlayedRay()
    answers = run(ray)
    assert next(answers) == "result of 0"
    answers.close()
    assert sorted(ray.killed) == [0, 1, 2]


def test_a_slow_shard_does_not_let_results_pile_up(monkeypatch):
    monkeypatch.setattr(tasks, "_AHEAD", 2)
    slow = []

    def pick(answers):
        slow[:] = [a for a in answers if ray._answers[a][1] == 0]
        others = [a for a in answers if a not in slow]
        return others[0] if others else slow[0]

    ray = PlayedRay(pick=pick)
    assert list(run(ray, shards=40, places=3)) == results(40)
    assert ray.done.index(0) == 5, "two shards a process, the slow one among them"


@pytest.mark.parametrize("images", [0, 1, 7, 40, 64, 1000])
@pytest.mark.parametrize("batch", [1, 4, 24, 100])
@pytest.mark.parametrize("processes", [0, 1, 3, 16])
def test_shards_are_whole_batches_and_all_images_once(images, batch, processes):
    pieces = cut(images, batch, processes)
    assert [k for piece in pieces for k in piece] == list(range(images))
    assert all(len(piece) % batch == 0 for piece in pieces[:-1])
    assert all(len(piece) <= max(64 + batch, batch) for piece in pieces)


def test_shards_share_the_images_evenly_and_stay_small():
    assert [len(piece) for piece in cut(40, 4, 2)] == [20, 20]
    assert [len(piece) for piece in cut(40, 4, 16)] == [4] * 10
    assert {len(piece) for piece in cut(6400, 16, 4)} == {64}, "what is lost with a node is little"

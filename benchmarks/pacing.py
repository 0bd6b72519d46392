"""Callers for load measurements: requests at fixed times over kept connections, and how long their answers took."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Timed = tuple[int, float]
"""Status of an answer (0: none came) and seconds it took."""
CALL_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Latency:
    """Response times in milliseconds."""

    count: int
    p50: float
    p99: float
    max: float


def latency(calls: Sequence[Timed]) -> Latency:
    """Median, 99th percentile and maximum of answers, in milliseconds; zeros for none."""
    times = sorted(seconds * 1000 for _, seconds in calls) or [0.0]
    at = [times[min(len(times) - 1, int(len(times) * q))] for q in (0.5, 0.99, 1.0)]
    return Latency(len(calls), *(round(value, 2) for value in at))


class Caller:
    """One kept connection to a port of this machine; opened again when the other side has closed it.

    Args:
        port: where to.
        headers: sent with every request.
    """

    def __init__(self, port: int, headers: Mapping[str, str]) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=CALL_TIMEOUT_S)
        self._headers = {"Content-Type": "application/json", **headers}
        self._used = False

    def post(self, path: str, body: bytes) -> int:
        """Send a body; the status of the answer, 0 when none came."""
        try:
            return self._post(path, body)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            idle = self._used and isinstance(error, ConnectionError)
            self._used = False
        # An idle connection that the other side had closed tells nothing about this request.
        return self.post(path, body) if idle else 0

    def _post(self, path: str, body: bytes) -> int:
        self._connection.request("POST", path, body, self._headers)
        response = self._connection.getresponse()
        response.read()
        self._used = True
        return response.status

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def open_loop(count: int, rate_per_s: float, callers: int, send: Callable[[int, int], int]) -> list[Timed]:
    """Call ``send(caller, number)`` at times fixed in advance, whether earlier answers have come or not.

    A request that finds no free caller waits for one, and that wait counts: seconds run from the time at which it
    should have been sent.

    Args:
        count: requests in all.
        rate_per_s: requests a second.
        callers: threads; each sends one request at a time.
        send: gives the status of the answer.

    Returns:
        One entry per request, in the order of the numbers.
    """
    answers: list[Timed] = [(0, 0.0)] * count
    numbers = iter(range(count))
    turn = threading.Lock()
    start = time.perf_counter() + 0.2

    def run(caller: int) -> None:
        while True:
            with turn:
                number = next(numbers, None)
            if number is None:
                return
            due = start + number / rate_per_s
            time.sleep(max(0.0, due - time.perf_counter()))
            status = send(caller, number)
            answers[number] = (status, time.perf_counter() - due)

    side_by_side(callers, run)
    return answers


def closed_loop(callers: int, calls: int, send: Callable[[int, int], int]) -> tuple[list[Timed], float]:
    """``callers`` at once, each calling ``send(caller, number)`` ``calls`` times in a row; answers, seconds in all."""
    answers: list[Timed] = []

    def run(caller: int) -> None:
        for number in range(calls):
            started = time.perf_counter()
            status = send(caller, number)
            answers.append((status, time.perf_counter() - started))

    started = time.perf_counter()
    side_by_side(callers, run)
    return answers, time.perf_counter() - started


def side_by_side(threads: int, run: Callable[[int], None]) -> None:
    """Run ``run(0)`` … ``run(threads - 1)`` in threads and wait for them."""
    started = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()

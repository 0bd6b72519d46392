"""Which detector a project trains that names none, and whether a detector's initial weights can be had at all.

Nothing is downloaded here and nothing heavy is imported: the service asks while a person waits for an answer.
"""

from __future__ import annotations

import http.client
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ppal_backend.detector.zoo import AUTO, ZOO_FILE, Weights, ZooEntry, default_zoo_root, load_zoo, zoo_tables
from ppal_backend.detector.zoo.fetch import described, fetch_command, target_of, verify, weights_target
from ppal_backend.detector.zoo.prompts import package_problem
from ppal_backend.errors import DetectorError, WeightsUnavailable

TIMEOUT_S = 5.0
_KINDS = ("cuda", "cpu")
_NO_HEAD = (405, 501)  # the server is there and answers other questions


@dataclass(frozen=True)
class AutoOrder:
    """The zoo's table ``auto``: detectors in the order in which they are tried, by where they train.

    Args:
        cuda: Names for a GPU.
        cpu: Names for a CPU.
        trial: What is left when the weights of none can be had: a detector for trying out, whose weights are shipped.
    """

    cuda: tuple[str, ...]
    cpu: tuple[str, ...]
    trial: str

    def names(self, device: str) -> tuple[str, ...]:
        """Names to try on ``cuda`` or ``cpu``, the one for trying out left out."""
        return self.cuda if device == "cuda" else self.cpu


@dataclass(frozen=True)
class Chosen:
    """A detector that was chosen and why, in words.

    Args:
        detector: Its name in the zoo.
        reason: Why this one, and why not those before it in the order.
        is_trial: Whether it is the one for trying out.
    """

    detector: str
    reason: str
    is_trial: bool


@dataclass
class Reach:
    """Asks whether addresses answer. A host that does not is asked once: the others on it would take as long.

    Args:
        timeout_s: Longest wait for a host, its name included.
    """

    timeout_s: float = TIMEOUT_S
    _silent: dict[str, str] = field(default_factory=dict)

    def problem(self, url: str) -> str:
        """Why nothing can be fetched from an address; "" when it answers."""
        host = urlsplit(url).netloc
        if host in self._silent:
            return self._silent[host]
        answers: queue.Queue[tuple[str, bool]] = queue.Queue()
        threading.Thread(target=lambda: answers.put(_ask(url, self.timeout_s)), daemon=True).start()
        try:
            problem, is_silent = answers.get(timeout=self.timeout_s)  # a name server may take longer than the host may
        except queue.Empty:
            problem, is_silent = f"no answer within {self.timeout_s:g} s", True
        if is_silent:
            self._silent[host] = problem
        return problem


def _ask(url: str, timeout_s: float) -> tuple[str, bool]:
    """What is wrong with an address, and whether its host is what does not answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s):
            return "", False
    except urllib.error.HTTPError as error:
        return ("" if error.code in _NO_HEAD else f"status {error.code}"), False
    except urllib.error.URLError as error:
        return _words(error.reason), True
    except (OSError, http.client.HTTPException, ValueError) as error:
        return _words(error), True


def _words(reason: object) -> str:
    """A system's error without its number."""
    return str(getattr(reason, "strerror", None) or reason) or type(reason).__name__


def weights_problem(entry: ZooEntry, weights_dir: Path | None = None, reach: Reach | None = None) -> str:
    """Why an entry's initial weights cannot be had (or what its prompts need), and what to do; "" when they can.

    They can where their file is in place and has its digest, where it is missing and its address answers, or where the
    detector is made to start from nothing.

    Args:
        entry: Zoo entry.
        weights_dir: Folder for downloads; the default one when None.
        reach: Asks addresses; without one, an address is asked for ``TIMEOUT_S`` at most.
    """
    reach = reach or Reach()
    for weights in (entry.weights, *([entry.vocabulary] if entry.vocabulary else [])):
        if problem := _problem(entry, weights, weights_dir, reach, brief=False):
            what = "initial weights" if weights is None else described(weights)
            return f"the {what} of {entry.name} cannot be had: {problem}; {_remedy(entry, weights, weights_dir)}"
    return package_problem(entry)


def _problem(entry: ZooEntry, weights: Weights | None, weights_dir: Path | None, reach: Reach, brief: bool) -> str:
    """What is wrong alone; in brief without folder and path, so that several fit into a sentence."""
    if weights is None:
        return "" if entry.from_scratch else "the zoo has none"
    target = target_of(weights, weights_dir)
    file = target.name if brief else str(target)
    if target.is_file():
        try:
            verify(weights, target, entry.name)
        except WeightsUnavailable:
            return f"{file} is damaged or another file"
        except OSError as error:
            return f"{file} cannot be read ({error.strerror or error})"
        return ""
    if weights.url is None:
        return f"there is no file {file}"
    problem = reach.problem(weights.url)
    if brief:
        return problem and f"no file, and {urlsplit(weights.url).netloc} cannot be reached ({problem})"
    return problem and f"there is no file {file} and {weights.url} cannot be reached ({problem})"


def _remedy(entry: ZooEntry, weights: Weights | None, weights_dir: Path | None) -> str:
    if weights is None:
        return "name another detector, or start at random (init_weights: random), which needs many more images"
    origin = weights.url or f"{weights.file_name} ({weights.source}, sha256 {weights.sha256})"
    return f"get {origin} and run `{fetch_command(entry.name, weights_dir)}` where detectors train, or name another one"


def auto_order(root: Path | None = None) -> AutoOrder:
    """The order of the zoo, or of the packaged one where an operator's zoo has none of its own.

    Raises:
        DetectorError: It is not as expected, or names a detector that the zoo does not have.
    """
    folder = default_zoo_root() if root is None else Path(root)
    table = zoo_tables(folder).get(AUTO) or zoo_tables(default_zoo_root()).get(AUTO, {})
    zoo = load_zoo(root)
    names = [*_names(table.get("cuda")), *_names(table.get("cpu")), *_names([table.get("trial")])]
    if not isinstance(table.get("trial"), str) or not all(isinstance(table.get(kind), list) for kind in _KINDS):
        raise DetectorError(
            f"expected lists 'cuda' and 'cpu' and a name 'trial' under [{AUTO}] in {folder / ZOO_FILE}, got "
            f"{sorted(table)}; correct the table or remove it"
        )
    if missing := sorted({name for name in names if name not in zoo}):
        raise DetectorError(
            f"expected detectors of the zoo at {folder / ZOO_FILE} for detector = {AUTO!r}, got {', '.join(missing)}, "
            f"which it does not have; give it a table [{AUTO}] of its own, or name a detector (PPAL_DETECTOR)"
        )
    return AutoOrder(tuple(table["cuda"]), tuple(table["cpu"]), table["trial"])


def _names(values: Any) -> list[str]:
    return [str(value) for value in values] if isinstance(values, list) else []


def choose(
    device: str, root: Path | None = None, weights_dir: Path | None = None, reach: Reach | None = None
) -> Chosen:
    """The first detector in the zoo's order whose initial weights are on disk or can be fetched.

    Args:
        device: ``cuda`` or ``cpu``: where it will train.
        root: Folder of the zoo; the packaged one when None.
        weights_dir: Folder for downloads; the default one when None.
        reach: Asks addresses.

    Raises:
        DetectorError: The zoo has no such order.
    """
    order, zoo, reach = auto_order(root), load_zoo(root), reach or Reach()
    where = "trains on a GPU" if device == "cuda" else "trains on a CPU"
    passed: dict[str, list[str]] = {}  # names by what is wrong: many entries lie on one host
    for name in order.names(device):
        problem = _problem(zoo[name], zoo[name].weights, weights_dir, reach, brief=True)
        if not problem:
            why = f"{where}; its weights {_origin(zoo[name], weights_dir)}"
            return Chosen(name, "; ".join([why, *_not(passed)]), is_trial=name == order.trial)
        passed.setdefault(problem, []).append(name)
    return Chosen(order.trial, "; ".join([where, *_not(passed)]), is_trial=True)


def _not(passed: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"not {', '.join(names)}: {problem}" for problem, names in passed.items()]


def _origin(entry: ZooEntry, weights_dir: Path | None) -> str:
    there = entry.weights is None or weights_target(entry, weights_dir).is_file()
    return "are on disk" if there else "can be downloaded"


def fetch_advice(device: str, root: Path | None = None, weights_dir: Path | None = None) -> str:
    """Commands that put weights of a detector in place that comes before the one for trying out; "" for none.

    Of those with an address the first, and those whose file people have to get elsewhere.

    Raises:
        DetectorError: The zoo has no such order.
    """
    order, zoo = auto_order(root), load_zoo(root)
    entries = [zoo[name] for name in order.names(device)]
    ways = [(e.name, str(e.weights.url)) for e in entries if e.weights and e.weights.url][:1]
    ways += [(e.name, e.weights.file) for e in entries if e.weights and e.weights.file]
    return " or ".join(f"`{fetch_command(name, weights_dir)}` (FILE: {file})" for name, file in ways)

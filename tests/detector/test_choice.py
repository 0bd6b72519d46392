"""Which detector is chosen: by the device, and by what lies on the disk and what answers at an address."""

from __future__ import annotations

import http.client
import io
import socket
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppal_backend.detector.zoo import find_entry, load_zoo
from ppal_backend.detector.zoo.choice import Reach, auto_order, choose, fetch_advice, weights_problem
from ppal_backend.errors import DetectorError
from ppal_backend.files import sha256_of
from tests.detector.test_real_weights import GIVEN

ENTRY = """
[{name}]
title = "{name}"
paper = "p"
config = "one.py"
head_family = "anchor"
input_size = [64, 64]
{more}
[{name}.schedule]
epochs = 1
min_iterations = 1
max_iterations = 1
batch_size = 1
lr = 0.1
"""
WEIGHTS = '[{name}.weights]\nkind = "detector"\n{origin}\nsha256 = "{digest}"\nlicence = "MIT"\nsource = "a drawer"\n'


class Net:
    """Addresses that answer, by host: nothing, a status, or an error; what was asked is remembered."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.down: dict[str, Exception | int] = {}

    def __call__(self, request: Any, timeout: float) -> io.BytesIO:
        self.asked.append((request.get_method(), request.full_url))
        failure = self.down.get(request.host)
        if isinstance(failure, int):
            raise urllib.error.HTTPError(request.full_url, failure, "no", http.client.HTTPMessage(), None)
        if failure is not None:
            raise failure
        return io.BytesIO()


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Net:
    made = Net()
    monkeypatch.setattr("urllib.request.urlopen", made)
    return made


@pytest.fixture
def world(tmp_path: Path, net: Net) -> Callable[..., tuple[Path, Path]]:
    """A zoo like the packaged one: two entries with addresses, ``drawer`` with a file alone, ``toy`` comes along."""

    def make(*on_disk: str, damaged: tuple[str, ...] = (), auto: str | None = None) -> tuple[Path, Path]:
        root, weights = tmp_path / "zoo", tmp_path / "weights"
        root.mkdir()
        weights.mkdir()
        (root / "one.py").write_text("")
        (root / "toy.pth").write_bytes(b"toy")
        contents = {name: root / f"of-{name}" for name in ("strong", "middle", "drawer")}
        text = auto or '[auto]\ncuda = ["strong", "middle"]\ncpu = ["middle", "drawer"]\ntrial = "toy"\n'
        for name, path in contents.items():
            path.write_bytes(name.encode())
            origin = 'file = "drawer.pth"' if name == "drawer" else f'url = "http://{name}.test/{name}.pth"'
            text += ENTRY.format(name=name, more=WEIGHTS.format(name=name, origin=origin, digest=sha256_of(path)))
            if name in on_disk:
                (weights / f"{name}.pth").write_bytes(b"cut off" if name in damaged else name.encode())
        digest = sha256_of(root / "toy.pth")
        text += ENTRY.format(name="toy", more=WEIGHTS.format(name="toy", origin='path = "toy.pth"', digest=digest))
        (root / "zoo.toml").write_text(text)
        return root, weights

    return make


OFFLINE = urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))
TABLE = {  # device, on disk, hosts that are down, what is chosen
    "a GPU and a network": ("cuda", (), (), "strong"),
    "a GPU, weights on disk, no network": ("cuda", ("strong",), ("strong.test", "middle.test"), "strong"),
    "a GPU, the strong one's host away": ("cuda", (), ("strong.test",), "middle"),
    "a GPU, no network": ("cuda", (), ("strong.test", "middle.test"), "toy"),
    "a GPU, the weights of a CPU's on disk": ("cuda", ("drawer",), ("strong.test", "middle.test"), "toy"),
    "a CPU and a network": ("cpu", (), (), "middle"),
    "a CPU, weights on disk, no network": ("cpu", ("middle",), ("middle.test",), "middle"),
    "a CPU, a file from elsewhere, no network": ("cpu", ("drawer",), ("middle.test",), "drawer"),
    "a CPU, a file from elsewhere and a network": ("cpu", ("drawer",), (), "middle"),
    "a CPU, no network": ("cpu", (), ("middle.test",), "toy"),
}


@pytest.mark.parametrize(("device", "on_disk", "down", "wanted"), TABLE.values(), ids=TABLE)
def test_the_first_whose_weights_can_be_had(
    world: Callable[..., tuple[Path, Path]], net: Net, device: str, on_disk: Any, down: Any, wanted: str
) -> None:
    root, weights = world(*on_disk)
    net.down = dict.fromkeys(down, OFFLINE)
    chosen = choose(device, root, weights)
    assert (chosen.detector, chosen.is_trial) == (wanted, wanted == "toy")
    assert chosen.reason.startswith(f"trains on a {'GPU' if device == 'cuda' else 'CPU'}")
    order = auto_order(root).names(device)
    for passed in order[: order.index(wanted) if wanted in order else len(order)]:
        why = "there is no file drawer.pth" if passed == "drawer" else f"no file, and {passed}.test cannot be reached ("
        assert f"not {passed}: {why}" in chosen.reason
    assert {method for method, _ in net.asked} <= {"HEAD"}, "nothing may be downloaded"
    assert sorted(p.name for p in weights.iterdir()) == [f"{name}.pth" for name in on_disk]


def test_a_reason_says_where_the_weights_are(world: Callable[..., tuple[Path, Path]]) -> None:
    root, weights = world("middle")
    assert choose("cpu", root, weights).reason == "trains on a CPU; its weights are on disk"
    assert choose("cuda", root, weights).reason == "trains on a GPU; its weights can be downloaded"


def test_a_damaged_file_is_passed_over_and_named(world: Callable[..., tuple[Path, Path]], net: Net) -> None:
    root, weights = world("middle", "drawer", damaged=("middle",))
    chosen = choose("cpu", root, weights)
    assert chosen.detector == "drawer" and net.asked == []
    assert "not middle: middle.pth is damaged or another file" in chosen.reason
    problem = weights_problem(load_zoo(root)["middle"], weights)
    assert problem.startswith("the initial weights of middle cannot be had: ")
    assert "get http://middle.test/middle.pth and run `ppal zoo fetch middle --from FILE" in problem


def test_a_folder_in_place_of_the_file_is_no_file(world: Callable[..., tuple[Path, Path]]) -> None:
    root, weights = world()
    (weights / "drawer.pth").mkdir()
    assert "there is no file" in weights_problem(load_zoo(root)["drawer"], weights)


ANSWERS = {
    "gone": (404, "status 404"),
    "forbidden": (403, "status 403"),
    "no HEAD here": (405, ""),
    "HEAD not known": (501, ""),
    "no name": (OFFLINE, "Name or service not known"),
    "refused": (urllib.error.URLError(ConnectionRefusedError(111, "Connection refused")), "Connection refused"),
    "slow": (TimeoutError("timed out"), "timed out"),
    "no HTTP": (http.client.BadStatusLine("SSH-2.0"), "SSH-2.0"),
}


@pytest.mark.parametrize(("failure", "wanted"), ANSWERS.values(), ids=ANSWERS)
def test_what_an_address_answers(net: Net, failure: Any, wanted: str) -> None:
    net.down["weights.test"] = failure
    found = Reach().problem("http://weights.test/net.pth")
    assert wanted in found and bool(found) == bool(wanted)


def test_a_host_that_does_not_answer_is_asked_once_and_one_that_lacks_a_file_is_not_given_up(net: Net) -> None:
    net.down = {"away.test": OFFLINE, "there.test": 404}
    reach = Reach()
    for _ in range(2):
        assert reach.problem("http://away.test/a.pth") and reach.problem("http://there.test/b.pth") == "status 404"
    assert [url for _, url in net.asked].count("http://away.test/a.pth") == 1
    assert [url for _, url in net.asked].count("http://there.test/b.pth") == 2


def test_nobody_waits_longer_than_the_time_out_even_for_a_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """``timeout`` of a request does not count while a name is looked up, which may take half a minute."""

    def hang(*_arguments: object, **_options: object) -> None:
        time.sleep(3)
        raise OSError("at last")

    monkeypatch.setattr("urllib.request.urlopen", hang)
    began = time.monotonic()
    assert Reach(0.2).problem("http://slow.test/x.pth") == "no answer within 0.2 s"
    assert time.monotonic() - began < 2


def test_an_entry_without_weights_can_be_had_where_it_trains_from_nothing(net: Net) -> None:
    assert weights_problem(find_entry("fcos_tiny")) == ""
    problem = weights_problem(find_entry("retinanet_swin_t"))
    assert "the zoo has none" in problem and "init_weights: random" in problem
    assert net.asked == []


def test_the_packaged_order_names_whole_detectors_and_ends_with_one_that_comes_along(net: Net, tmp_path: Path) -> None:
    order, zoo = auto_order(), load_zoo()
    for name in (*order.cuda, *order.cpu):
        weights = zoo[name].weights
        assert weights is not None and weights.kind == "detector" and weights.path is None, name
    assert order.cpu == ("yolox_tiny", "yolox_nano") and order.trial == "retinanet_tiny"
    assert (zoo[order.cuda[0]].coco_ap or 0) > (zoo["yolox_tiny"].coco_ap or 0)
    net.down["download.openmmlab.com"] = OFFLINE
    last = choose("cuda", weights_dir=tmp_path)
    assert (last.detector, last.is_trial) == ("retinanet_tiny", True)
    assert len(net.asked) == 1, "three entries on a host that does not answer, asked once"
    assert last.reason == (
        "trains on a GPU; not rtmdet_s, yolox_s, yolox_tiny: no file, and download.openmmlab.com cannot be reached "
        "(Name or service not known); not yolox_nano: there is no file yolox_nano_coco.pth"
    )


def test_the_advice_names_a_command_and_a_file_for_it(net: Net, tmp_path: Path) -> None:
    advice = fetch_advice("cpu", weights_dir=tmp_path)
    address = find_entry("yolox_tiny").weights
    assert (
        address is not None
        and f"ppal zoo fetch yolox_tiny --from FILE --to {tmp_path}` (FILE: {address.url}) or " in advice
    )
    assert advice.endswith(f"ppal zoo fetch yolox_nano --from FILE --to {tmp_path}` (FILE: yolox_nano_coco.pth)")


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        ('[auto]\ncuda = "strong"\ncpu = ["middle"]\ntrial = "toy"\n', "expected lists 'cuda' and 'cpu'"),
        ('[auto]\ncuda = ["strong"]\ncpu = ["middle"]\n', "a name 'trial'"),
        ('[auto]\ncuda = ["strong"]\ncpu = ["yolo99"]\ntrial = "toy"\n', "got yolo99, which it does not have"),
        ("[recipe.x]\nlr = 0.1\n", "retinanet_tiny.*which it does not have; give it a table .auto. of its own"),
    ],
)
def test_an_operators_order_that_cannot_be_used_is_told(
    world: Callable[..., tuple[Path, Path]], table: str, wanted: str
) -> None:
    root, weights = world(auto=table)
    with pytest.raises(DetectorError, match=wanted):
        choose("cpu", root, weights)


def test_an_operators_zoo_beside_the_packaged_one_has_its_order_or_one_of_its_own(
    world: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    root, _ = world(auto="include_packaged = true\n")
    assert auto_order(root) == auto_order()
    file = root / "zoo.toml"
    file.write_text(file.read_text() + '[auto]\ncuda = ["strong"]\ncpu = ["yolox_tiny"]\ntrial = "toy"\n')
    assert auto_order(root).cuda == ("strong",) and "auto" not in load_zoo(root)


@pytest.mark.shared
@pytest.mark.skipif(not GIVEN.is_file(), reason=f"needs the weights at {GIVEN}")
def test_without_a_network_real_weights_on_disk_are_found(net: Net) -> None:
    net.down["download.openmmlab.com"] = OFFLINE
    chosen = choose("cpu", weights_dir=GIVEN.parent)
    assert (chosen.detector, chosen.is_trial) == ("yolox_nano", False)
    assert chosen.reason == (
        "trains on a CPU; its weights are on disk; not yolox_tiny: no file, and download.openmmlab.com cannot be "
        "reached (Name or service not known)"
    )

"""Files of another machine: read in place where they are the same, fetched where they are not."""

import os
from pathlib import Path

from ppal_backend.engines.ray import node
from ppal_backend.engines.ray.node import FileStamp, bring, read_files


def stamped(path, content):
    path.write_bytes(content)
    return FileStamp.of(path)


def nothing_to_read(paths):
    raise AssertionError(f"fetched {paths}")


def test_a_shared_file_is_read_in_place(tmp_path):
    stamp = stamped(tmp_path / "1.png", b"one")
    assert bring([stamp], tmp_path, nothing_to_read) == [stamp.path]


def test_files_that_are_not_here_come_as_bytes_and_in_order(tmp_path):
    here, gone, other = (stamped(tmp_path / f"{n}.jpg", b"%d" % n) for n in range(3))
    contents = {gone.path: b"far", other.path: b"other"}
    Path(gone.path).unlink()
    (tmp_path / "2.jpg").write_bytes(b"another image of the same name")
    copies = tmp_path / "copies"
    copies.mkdir()
    asked = []

    def read_there(paths):
        asked.append(paths)
        return [contents[path] for path in paths]

    paths = bring([here, gone, other], copies, read_there)
    assert read_files(paths) == [b"0", b"far", b"other"] and asked == [[gone.path, other.path]]
    assert paths[0] == here.path and [Path(path).suffix for path in paths[1:]] == [".jpg", ".jpg"]


def test_a_file_of_the_same_size_from_another_time_is_another_file(tmp_path):
    stamp = stamped(tmp_path / "1.png", b"one")
    os.utime(stamp.path, ns=(0, 0))
    (path,) = bring([stamp], tmp_path, lambda paths: [b"two"])
    assert path != stamp.path and read_files([path]) == [b"two"]


def test_a_file_that_is_nowhere_keeps_its_path(tmp_path):
    never = FileStamp.of(tmp_path / "never.png")
    lost = stamped(tmp_path / "lost.png", b"x")
    Path(lost.path).unlink()
    assert never.size == -1
    assert bring([never], tmp_path, nothing_to_read) == [never.path]
    assert bring([lost], tmp_path, read_files) == [lost.path], "it went while it was looked for"


def test_files_travel_in_groups_of_a_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(node, "_BYTES_AT_ONCE", 5)
    stamps = [FileStamp(f"/far/{n}", size, 0) for n, size in enumerate((2, 3, 1, 9, 1))]
    groups = []

    def read_there(paths):
        groups.append([int(path[-1]) for path in paths])
        return [b"."] * len(paths)

    bring(stamps, tmp_path, read_there)
    assert groups == [[0, 1], [2], [3], [4]]

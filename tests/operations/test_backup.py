"""A backup brings everything back, holds no secret, and neither it nor a restore can destroy anything."""

import errno
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from sqlalchemy import text

from ppal_backend.errors import StateError
from ppal_backend.operations.backup import back_up, restore
from ppal_backend.operations.control import roll_back
from ppal_backend.settings import load_settings
from ppal_backend.store import Lease, SeenAnnotation, open_store
from ppal_backend.store.database import SCHEMA_VERSION

TOKEN, PASSWORD = "f00dfeed" * 5, "correct horse battery"


@pytest.fixture
def place(make_place):
    return make_place(LABEL_STUDIO_API_KEY=TOKEN, BASIC_AUTH_USER="op", BASIC_AUTH_PASS=PASSWORD)


def elsewhere(tmp_path):
    return load_settings(MODEL_DIR=tmp_path / "new")


def test_state_and_active_model_come_back(place, tmp_path):
    place.round()
    place.round()
    place.store.ledger.see(1, [SeenAnnotation(99, 5)])
    roll_back(place.settings, place.store, place.client, 1, place.versions()[0])
    with place.store.database.transaction() as session:  # a writer at work does not hold it up or get half into it
        session.execute(text("UPDATE projects SET url = 'half'"))
        manifest = back_up(place.settings, place.store, tmp_path / "b.tar")
    settings = elsewhere(tmp_path)
    assert restore(settings, tmp_path / "b.tar") == manifest
    store = open_store(settings)
    assert store.versions.active(1).version == place.versions()[0] and store.projects.get(1).url != "half"
    assert [r.state for r in store.rounds.of_project(1)] == ["done", "done"] and store.ledger.new_count(1) == 1
    store.close()
    checkpoint = settings.model_dir / "projects/1/rounds/1/train/model.pth"
    assert checkpoint.read_bytes() == b"weights of round 1"
    assert not (settings.model_dir / "projects/1/rounds/2/train").exists(), "only what the active version needs"
    assert (settings.model_dir / "projects/1/project.json").read_text() == '{\n "key": "1.1"\n}'


def test_no_secret_is_in_it(place, tmp_path):
    place.round()
    back_up(place.settings, place.store, tmp_path / "b.tar")
    content = (tmp_path / "b.tar").read_bytes()
    assert TOKEN.encode() not in content and PASSWORD.encode() not in content and b"http://ls.test" in content


def test_data_is_only_replaced_on_demand_and_then_moved_aside(place, tmp_path):
    place.round()
    back_up(place.settings, place.store, tmp_path / "b.tar")
    with pytest.raises(StateError, match="which exists"):
        back_up(place.settings, place.store, tmp_path / "b.tar")
    place.round()
    with pytest.raises(StateError, match="use --force"):
        restore(place.settings, tmp_path / "b.tar")
    place.store.rounds.request(1, "train", "x")
    record = place.store.rounds.claim(1, Lease.mine())
    with pytest.raises(StateError, match="a round of project 1 is running"):
        restore(place.settings, tmp_path / "b.tar", force=True)
    place.store.rounds.release(record.id)
    place.store.close()
    restore(place.settings, tmp_path / "b.tar", force=True)
    store = open_store(place.settings)
    assert len(store.rounds.of_project(1)) == 1
    store.close()
    (aside,) = place.settings.model_dir.glob("replaced-*")
    assert (aside / "ppal.db").is_file() and (aside / "projects/1/rounds/2/train/model.pth").is_file()


def set_schema(store, schema):
    with store.database.transaction() as session:
        session.execute(text("UPDATE alembic_version SET version_num = :schema"), {"schema": schema})


@pytest.mark.parametrize("unusable", ["newer", "no database", "damaged pages", "empty"])
def test_a_state_that_this_release_cannot_use_is_replaced(place, tmp_path, caplog, unusable):
    place.round()
    back_up(place.settings, place.store, tmp_path / "b.tar")
    if unusable == "newer":
        set_schema(place.store, "9999")
    place.store.close()
    database = place.settings.model_dir / "ppal.db"
    if unusable != "newer":
        content = database.read_bytes()
        half = content[:4096] + os.urandom(len(content) - 4096)
        database.write_bytes({"no database": b"x" * 9000, "damaged pages": half, "empty": b""}[unusable])
    bad = database.read_bytes()
    restore(place.settings, tmp_path / "b.tar", force=True)
    store = open_store(place.settings)
    assert len(store.rounds.of_project(1)) == 1
    store.close()
    (aside,) = place.settings.model_dir.glob("replaced-*")
    assert (aside / "ppal.db").read_bytes() == bad or unusable == "empty"
    told = "cannot tell whether a round is running" in caplog.text
    assert told == (unusable in ("no database", "damaged pages"))


@pytest.mark.parametrize("schema", ["0001", "9999"])
def test_a_running_round_is_seen_in_another_releases_state_which_stays_as_it_is(place, tmp_path, schema):
    place.round()
    back_up(place.settings, place.store, tmp_path / "b.tar")
    place.store.rounds.request(1, "train", "x")
    place.store.rounds.claim(1, Lease.mine())
    set_schema(place.store, schema)
    with pytest.raises(StateError, match="a round of project 1 is running"):
        restore(place.settings, tmp_path / "b.tar", force=True)
    with place.store.database.reading() as session:
        assert session.scalar(text("SELECT version_num FROM alembic_version")) == schema
    assert not list(place.settings.model_dir.glob("replaced-*"))


def test_a_backup_of_a_newer_release_is_refused_before_anything_changes(place, tmp_path):
    place.round()
    set_schema(place.store, "9999")
    back_up(place.settings, place.store, tmp_path / "b.tar")
    set_schema(place.store, SCHEMA_VERSION)
    place.store.close()
    before = contents(place.settings.model_dir)
    with pytest.raises(StateError, match=r"b\.tar.*nothing was changed.*got 9999: a newer release"):
        restore(place.settings, tmp_path / "b.tar", force=True)
    assert contents(place.settings.model_dir) == before


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def two_disks(tmp_path, monkeypatch):
    """The folder ``disk`` is another file system than its neighbours."""
    rename, disk = os.rename, tmp_path / "disk"

    def within_one_disk(source, target, **options):
        if Path(source).is_relative_to(disk) != Path(target).is_relative_to(disk):
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source), None, str(target))
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", within_one_disk)
    return disk


def test_a_database_on_another_disk_is_restored(place, tmp_path, two_disks):
    place.round()
    back_up(place.settings, place.store, tmp_path / "b.tar")
    settings = load_settings(MODEL_DIR=tmp_path / "new", database_url=f"sqlite:///{two_disks}/state.db")
    restore(settings, tmp_path / "b.tar")
    store = open_store(settings)
    assert len(store.rounds.of_project(1)) == 1
    store.close()
    assert [path.name for path in two_disks.iterdir()] == ["state.db"]
    assert [path.name for path in settings.model_dir.iterdir()] == ["projects"]


def test_a_database_that_cannot_be_put_in_its_place_changes_nothing(place, tmp_path):
    place.round()
    back_up(place.settings, place.store, tmp_path / "b.tar")
    place.store.close()
    (tmp_path / "file").touch()
    settings = load_settings(MODEL_DIR=place.settings.model_dir, database_url=f"sqlite:///{tmp_path}/file/ppal.db")
    before = contents(settings.model_dir)
    with pytest.raises(OSError, match="file"):
        restore(settings, tmp_path / "b.tar", force=True)
    assert contents(settings.model_dir) == before


def test_what_sqlite_keeps_beside_a_database_counts_as_the_database(place, tmp_path):
    """SQLite would write a log that stayed behind over the restored file."""
    place.round()
    back_up(place.settings, place.store, tmp_path / "b.tar")
    outside = tmp_path / "state"
    outside.mkdir()
    names = ["ppal.db", "ppal.db-wal", "ppal.db-shm", "ppal.db-journal"]
    for name in names:
        (outside / name).touch()
    settings = load_settings(MODEL_DIR=tmp_path / "new", database_url=f"sqlite:///{outside}/ppal.db")
    for number in range(len(names)):
        with pytest.raises(StateError, match=rf"got {', '.join(names[number:])} in .*move them away together"):
            restore(settings, tmp_path / "b.tar")
        assert list(settings.model_dir.iterdir()) == []
        (outside / names[number]).unlink()
    restore(settings, tmp_path / "b.tar")
    assert (outside / "ppal.db").stat().st_size > 0


def test_the_folder_of_a_database_within_the_data_folder_stays(place, tmp_path):
    """It may be a disk of its own, which cannot be moved aside."""
    place.round()
    back_up(place.settings, place.store, tmp_path / "b.tar")
    (tmp_path / "new/state").mkdir(parents=True)
    settings = load_settings(MODEL_DIR=tmp_path / "new", database_url=f"sqlite:///{tmp_path}/new/state/ppal.db")
    restore(settings, tmp_path / "b.tar")
    (tmp_path / "new/state/ppal.db").unlink()
    restore(settings, tmp_path / "b.tar", force=True)
    assert (tmp_path / "new/state/ppal.db").is_file()


def test_backups_settings_and_the_cache_in_the_data_folder_are_no_state(place, tmp_path):
    """The image's commands start in the data folder: `ppal backup x.tar` puts its file there."""
    place.round()
    new = tmp_path / "new"
    for name in ("cache/weights.pth", "ppal.toml", "older.tar"):
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).write_text(name)
    back_up(place.settings, place.store, new / "b.tar")
    settings = load_settings(MODEL_DIR=new, PPAL_CACHE=new / "cache")
    restore(settings, new / "b.tar")
    assert not list(new.glob("replaced-*")) and (new / "ppal.db").is_file()
    assert all((new / name).read_text() == name for name in ("cache/weights.pth", "ppal.toml", "older.tar"))
    with pytest.raises(StateError, match=r"got .*new with \d entries; use --force"):
        restore(settings, new / "b.tar")
    restore(settings, new / "b.tar", force=True)
    assert (new / "b.tar").is_file() and (new / "cache/weights.pth").is_file(), "they stay where they are"


def own_detector(zoo, head="mine"):
    """What `ppal zoo add` leaves: the table, and a folder with the config and large weights."""
    for name, content in {"zoo.toml": head, "mine/config.py": "model = 1", "mine/weights.pth": "w" * 3000}.items():
        (zoo / name).parent.mkdir(parents=True, exist_ok=True)
        (zoo / name).write_text(content)


def test_the_operators_own_detectors_come_back(place, tmp_path):
    place.round()
    own_detector(place.settings.own_zoo)
    (place.settings.own_zoo / "mine/.weights.pth.half").write_text("being written")
    stored = tmp_path / "elsewhere.py"
    stored.write_text("linked")
    (place.settings.own_zoo / "mine/base.py").symlink_to(stored)
    manifest = back_up(place.settings, place.store, tmp_path / "b.tar")
    assert manifest["own_zoo"] == {"folder": "zoo", "files": 4, "bytes": 4 + 9 + 3000 + 6}
    assert manifest["left_out"] == []
    stored.unlink()
    settings = elsewhere(tmp_path)
    restore(settings, tmp_path / "b.tar")
    assert settings.model_zoo == settings.model_dir / "zoo", "it is the zoo in force"
    found = {str(p.relative_to(settings.own_zoo)): p.read_text() for p in settings.own_zoo.rglob("*") if p.is_file()}
    assert found == {
        "zoo.toml": "mine", "mine/config.py": "model = 1", "mine/weights.pth": "w" * 3000, "mine/base.py": "linked",
    }  # fmt: skip


def test_own_detectors_of_another_folder_are_named_as_left_out(make_place, tmp_path, caplog):
    place = make_place(PPAL_MODEL_ZOO=tmp_path / "detectors")
    manifest = back_up(place.settings, place.store, tmp_path / "none.tar")
    assert (manifest["own_zoo"], manifest["left_out"]) == (None, []) and "your own" not in caplog.text
    own_detector(tmp_path / "detectors")
    manifest = back_up(place.settings, place.store, tmp_path / "b.tar")
    assert (manifest["own_zoo"], manifest["left_out"]) == (None, [str(tmp_path / "detectors")])
    assert f"without your own detectors in {tmp_path / 'detectors'}" in caplog.text
    caplog.clear()
    restore(elsewhere(tmp_path), tmp_path / "b.tar")
    assert f"without {tmp_path / 'detectors'}" in caplog.text


def test_own_detectors_stay_unless_the_backup_brings_some(place, tmp_path):
    place.round()
    back_up(place.settings, place.store, tmp_path / "without.tar")
    settings = elsewhere(tmp_path)
    own_detector(settings.own_zoo, "added first")
    restore(settings, tmp_path / "without.tar")
    restore(settings, tmp_path / "without.tar", force=True)
    assert (settings.own_zoo / "zoo.toml").read_text() == "added first", "they stay where they are"

    own_detector(place.settings.own_zoo, "of the backup")
    back_up(place.settings, place.store, tmp_path / "with.tar")
    (other := tmp_path / "other").mkdir()
    theirs = load_settings(MODEL_DIR=other)
    own_detector(theirs.own_zoo, "theirs")
    with pytest.raises(StateError, match=r"got .*other with 1 entries; use --force"):
        restore(theirs, tmp_path / "with.tar")
    restore(theirs, tmp_path / "with.tar", force=True)
    (aside,) = other.glob("replaced-*")
    assert (aside / "zoo/zoo.toml").read_text() == "theirs"
    assert (theirs.own_zoo / "zoo.toml").read_text() == "of the backup"


def test_own_detectors_are_told_where_the_settings_look_elsewhere(place, tmp_path, caplog):
    place.round()
    own_detector(place.settings.own_zoo)
    back_up(place.settings, place.store, tmp_path / "b.tar")
    settings = load_settings(MODEL_DIR=tmp_path / "new", PPAL_MODEL_ZOO=tmp_path / "detectors")
    restore(settings, tmp_path / "b.tar")
    assert (settings.model_dir / "zoo/zoo.toml").is_file()
    assert f"are in {settings.model_dir / 'zoo'}, but PPAL_MODEL_ZOO is {tmp_path / 'detectors'}" in caplog.text


def test_a_detector_added_meanwhile_leaves_the_backup_whole(place, tmp_path, monkeypatch):
    """`ppal zoo add` puts files first, then replaces the table: also between a checksum and its file."""
    place.round()
    own_detector(place.settings.own_zoo)
    told = []

    def add(progress):
        if not told:
            own_detector(place.settings.own_zoo, "another table")
        told.append(progress)

    back_up(place.settings, place.store, tmp_path / "b.tar", add)
    settings = elsewhere(tmp_path)
    restore(settings, tmp_path / "b.tar")
    assert told and (settings.own_zoo / "zoo.toml").read_text() == "mine"


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "extra", "newer"])
def test_a_damaged_backup_is_refused_before_anything_changes(place, tmp_path, damage):
    place.round()
    good, bad = tmp_path / "b.tar", tmp_path / "bad.tar"
    back_up(place.settings, place.store, good)
    content = good.read_bytes()
    if damage == "cut":
        bad.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        bad.write_bytes(content.replace(b"weights of round 1", b"weights of round 2"))
    elif damage == "foreign":
        bad.write_bytes(b"not a tar at all")
    else:
        _repack(good, bad, damage)
    settings = elsewhere(tmp_path)
    with pytest.raises(StateError, match=r"damaged|made by ppal backup|use a newer release"):
        restore(settings, bad)
    assert list(settings.model_dir.iterdir()) == []


def _repack(good, bad, damage):
    import io

    with tarfile.open(good) as source, tarfile.open(bad, "w") as target:
        for member in source.getmembers():
            data = source.extractfile(member).read()
            if member.name == "manifest.json" and damage == "newer":
                data = json.dumps({**json.loads(data), "format": 2}).encode()
                member.size = len(data)
            target.addfile(member, io.BytesIO(data))
        if damage == "extra":
            member = tarfile.TarInfo("projects/1/evil.pth")
            member.size = 4
            target.addfile(member, io.BytesIO(b"evil"))


def test_a_path_out_of_the_folder_is_refused(place, tmp_path):
    import io

    with tarfile.open(tmp_path / "bad.tar", "w") as target:
        member = tarfile.TarInfo("../escaped")
        member.size = 4
        target.addfile(member, io.BytesIO(b"evil"))
    with pytest.raises(StateError, match="made by ppal backup"):
        restore(elsewhere(tmp_path), tmp_path / "bad.tar")
    assert not (tmp_path / "escaped").exists()


def test_what_another_machine_made_is_fetched_from_the_bucket(make_place, tmp_path):
    place = make_place(artifacts=f"file://{tmp_path}/bucket")
    place.round()
    shutil.rmtree(place.folder(1))
    back_up(place.settings, place.store, tmp_path / "b.tar")
    restore(elsewhere(tmp_path), tmp_path / "b.tar")
    there = elsewhere(tmp_path).model_dir / "projects/1/rounds/1"
    assert (there / "train/model.pth").read_bytes() == b"weights of round 1"
    assert (there / "query_set.json").is_file() and (there / "metrics.json").is_file()


def test_a_checkpoint_that_is_nowhere_is_told(place, tmp_path, caplog):
    place.round()
    (place.folder(1) / "train/model.pth").unlink()
    manifest = back_up(place.settings, place.store, tmp_path / "b.tar")
    assert "is without" in caplog.text and "model.pth" in caplog.text
    assert "ppal.db" in manifest["sha256"] and not any(name.endswith(".pth") for name in manifest["sha256"])

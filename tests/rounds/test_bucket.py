"""Objects: what goes in comes out, nothing is believed unchecked, and every refusal says what to do."""

import sys
import uuid

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ppal_backend.errors import ArtifactsUnavailable, DamagedArtifact, SettingsError
from ppal_backend.files import sha256_of
from ppal_backend.rounds.bucket import PROBE, TRIES, Bucket
from tests.s3 import s3_server

CONTENT = bytes(range(256)) * 5000


@pytest.fixture(scope="module")
def s3():
    with s3_server() as client:
        yield client


@pytest.fixture(params=["file", "memory", pytest.param("s3", marks=pytest.mark.servers)])
def url(request, tmp_path):
    name = uuid.uuid4().hex
    if request.param == "file":
        return f"file://{tmp_path}/bucket"
    if request.param == "s3":
        request.getfixturevalue("s3").create_bucket(Bucket=name)
        return f"s3://{name}/some/prefix"
    return f"memory://{name}"


@pytest.fixture
def slept():
    return []


@pytest.fixture
def bucket(url, slept):
    return Bucket(url, slept.append)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.bin"
    path.write_bytes(CONTENT)
    return path


def test_what_goes_in_comes_out(bucket, source, tmp_path):
    bucket.upload(source, "a/1/train/model.pth")
    bucket.write("a/1/steps/train.json", b"{}")
    bucket.write("a/10/spec.json", b"[]")
    assert bucket.names("a/1") == ["a/1/steps/train.json", "a/1/train/model.pth"], "and not those of a/10"
    assert bucket.read("a/10/spec.json") == b"[]"
    target = tmp_path / "deep" / "target.bin"
    bucket.download("a/1/train/model.pth", target, sha256_of(source))
    assert target.read_bytes() == CONTENT
    assert [p.name for p in target.parent.iterdir()] == ["target.bin"]
    bucket.delete(["a/1/train/model.pth", "a/1/never/there"])
    assert bucket.names("a/1") == ["a/1/steps/train.json"]
    assert bucket.read("a/1/train/model.pth") is None and bucket.names("z") == []


def test_the_check_leaves_nothing(bucket):
    bucket.check()
    assert bucket.read(PROBE) is None


def test_a_damaged_object_is_fetched_twice_and_then_refused(bucket, source, tmp_path, caplog):
    wanted = sha256_of(source)
    bucket.write("model.pth", CONTENT[:-1] + b"x")
    target = tmp_path / "target.bin"
    target.write_bytes(b"what was here before")
    with pytest.raises(DamagedArtifact, match=r"expected model\.pth in .*as it was written.*train again"):
        bucket.download("model.pth", target, wanted)
    assert target.read_bytes() == b"what was here before" and caplog.text.count("is not as it was written") == 2
    with pytest.raises(DamagedArtifact):
        bucket.download("never there", target, wanted)


class Flaky:
    """A method that breaks ``failures`` times before it works, each time after half of its work."""

    def __init__(self, inner, failures, spoil=None):
        self.inner, self.failures, self.spoil = inner, failures, spoil

    def __call__(self, *arguments, **options):
        if self.failures:
            self.failures -= 1
            if self.spoil is not None:
                return self.spoil(*arguments)
            raise ConnectionResetError("the connection broke")
        return self.inner(*arguments, **options)


@pytest.fixture
def in_memory(slept):
    return Bucket(f"memory://{uuid.uuid4().hex}", slept.append)


def test_an_upload_that_breaks_is_repeated_with_pauses(in_memory, source, slept, monkeypatch):
    monkeypatch.setattr(in_memory._files, "put_file", Flaky(in_memory._files.put_file, TRIES - 1))
    in_memory.upload(source, "x")
    assert in_memory.read("x") == CONTENT and slept == [1.0, 2.0]


def test_an_upload_that_was_cut_short_is_repeated(in_memory, source, monkeypatch):
    def half(path, name):
        in_memory._files.pipe_file(name, CONTENT[:100])

    monkeypatch.setattr(in_memory._files, "put_file", Flaky(in_memory._files.put_file, 1, half))
    in_memory.upload(source, "x")
    assert in_memory.read("x") == CONTENT


def test_a_bucket_that_stays_away_says_so(in_memory, source, slept, monkeypatch):
    monkeypatch.setattr(in_memory._files, "put_file", Flaky(None, 99))
    with pytest.raises(ArtifactsUnavailable, match="to take x, got ConnectionResetError: the connection broke, 3"):
        in_memory.upload(source, "x")
    assert len(slept) == TRIES - 1


def test_a_download_that_comes_damaged_once_is_fetched_again(in_memory, source, tmp_path, monkeypatch):
    in_memory.upload(source, "x")
    in_memory.write("broken", b"other")

    def other(path, mode):
        return MemoryFileSystem.open(in_memory._files, in_memory._path("broken"), mode)

    monkeypatch.setattr(in_memory._files, "open", Flaky(in_memory._files.open, 1, other))
    in_memory.download("x", tmp_path / "y", sha256_of(source))
    assert (tmp_path / "y").read_bytes() == CONTENT


def test_a_full_disk_is_not_taken_for_the_bucket_s_fault(in_memory, source, tmp_path, monkeypatch):
    in_memory.upload(source, "x")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ppal_backend.rounds.bucket.shutil.copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        in_memory.download("x", tmp_path / "y", sha256_of(source))


@pytest.mark.parametrize("url", ["no address", "nosuchscheme://x/y"])
def test_an_address_that_is_none_says_what_one_looks_like(url):
    with pytest.raises(SettingsError, match="expected PPAL_ARTIFACTS such as s3://bucket/prefix"):
        Bucket(url)


def test_without_the_package_for_s3_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(SettingsError, match=r"install ppal-backend\[s3\]"):
        Bucket("s3://bucket/prefix")


@pytest.mark.servers
def test_a_bucket_that_does_not_exist_says_what_to_do(s3):
    with pytest.raises(SettingsError, match=r"expected a bucket at PPAL_ARTIFACTS=s3://not-there/x, got none; create"):
        Bucket("s3://not-there/x").check()


@pytest.mark.servers
def test_a_server_that_is_down_says_so_and_no_secret(s3, monkeypatch, caplog):
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    caplog.set_level("DEBUG")
    try:
        with pytest.raises(ArtifactsUnavailable, match="Could not connect") as told:
            Bucket("s3://bucket/x", lambda _: None).write("x", b"y")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
    assert s3.secret not in str(told.value)

"""The HF cache of a host: what arrives is whole or is not published; names from other machines cannot leave it."""

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from http.client import IncompleteRead
from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host.model.model_cache import (
    ModelCache,
    checked_commit,
    checked_files,
)
from ansible.module_utils.mixtral_run_host.spread.blobs import CopyError, RemoteFile, digest_of

COMMIT = "c" * 40
MODEL = "org/model"
FILES = {"config.json": b'{"a": 1}', "sub/model-1.safetensors": bytes(range(256)) * 900}


class Source:
    """Another machine that gives the bytes that it has under each hash."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.contents = {hashlib.sha256(data).hexdigest(): data for data in files.values()}
        self.starts: list[int] = []
        self.longest = 10**9

    @contextlib.contextmanager
    def open_file(self, file: RemoteFile, start: int) -> Iterator[tuple[io.BytesIO, bool]]:
        self.starts.append(start)
        yield io.BytesIO(self.contents[file.digest][start : start + self.longest]), True


def _listed(files: dict[str, bytes]) -> list[RemoteFile]:
    return [RemoteFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()]


def _fetch(source: Source, home: Path, files: dict[str, bytes] = FILES) -> ModelCache:
    cache = ModelCache(str(home), MODEL)
    for file in _listed(files):
        if not cache.has(file):
            cache.fetch(source, file)
    cache.publish("main", COMMIT, _listed(files))
    return cache


def test_the_cache_is_laid_out_as_huggingface_hub_reads_it(tmp_path: Path) -> None:
    _fetch(Source(FILES), tmp_path)
    from huggingface_hub import snapshot_download

    found = Path(snapshot_download(MODEL, cache_dir=tmp_path / "hub", local_files_only=True))
    assert {name: (found / name).read_bytes() for name in FILES} == FILES


def test_a_second_publication_changes_nothing(tmp_path: Path) -> None:
    assert _fetch(Source(FILES), tmp_path).publish("main", COMMIT, _listed(FILES)) is False


def test_it_continues_where_it_stopped(tmp_path: Path) -> None:
    source = Source(FILES)
    source.longest = 100_000
    for _ in range(2):
        with pytest.raises(CopyError, match="bytes arrived") as failure:
            _fetch(source, tmp_path)
        assert "run again" in failure.value.remedy
    assert not (tmp_path / "hub/models--org--model/refs/main").exists()
    source.longest = 10**9
    _fetch(source, tmp_path)
    assert source.starts == [0, 0, 100_000, 200_000]


def test_wrong_bytes_are_removed_and_reported(tmp_path: Path) -> None:
    source = Source(FILES)
    digest = _listed(FILES)[1].digest
    source.contents[digest] = source.contents[digest][:-1] + b"?"
    with pytest.raises(CopyError, match="with hash") as failure:
        _fetch(source, tmp_path)
    assert "anew" in failure.value.remedy
    assert [path.name for path in (tmp_path / "hub/models--org--model/blobs").iterdir()] == [_listed(FILES)[0].digest]


def test_a_blob_is_checked_by_its_name(tmp_path: Path) -> None:
    cache, (file, other) = _fetch(Source(FILES), tmp_path), _listed(FILES)
    cache.check(file)
    Path(cache.blob(file.digest)).write_bytes(b'{"a": 2}')
    with pytest.raises(CopyError, match=r"config\.json: expected a file with hash"):
        cache.check(file)
    assert not Path(cache.blob(file.digest)).exists() and Path(cache.blob(other.digest)).exists()


class BreakingSource:
    """STAND-IN for a connection that ends with an error instead of the file's end."""

    def __init__(self, data: bytes, error: Exception | None) -> None:
        self.data, self.error = data, error

    @contextlib.contextmanager
    def open_file(self, _file: RemoteFile, start: int) -> Iterator[tuple[io.BytesIO, bool]]:
        stream, error = io.BytesIO(self.data[start:]), self.error

        class Stream(io.BytesIO):
            def read(self, _size: int | None = -1) -> bytes:
                found = stream.read(1000)
                if not found and error:
                    raise error
                return found

        yield Stream(), True


@pytest.mark.parametrize(
    ("error", "more"),
    [(ConnectionResetError("reset"), b""), (TimeoutError(), b""), (IncompleteRead(b"abc", 9), b"abc")],
)
def test_a_connection_that_breaks_off_is_reported_and_what_came_is_kept(
    tmp_path: Path, error: Exception, more: bytes
) -> None:
    data = bytes(range(256)) * 20 + b"abcdef"
    file = RemoteFile("w.safetensors", len(data), hashlib.sha256(data).hexdigest())
    cache = ModelCache(str(tmp_path), MODEL)
    with pytest.raises(CopyError, match=r"w\.safetensors: the connection broke off") as failure:
        cache.fetch(BreakingSource(data[:-6], error), file)
    assert "it goes on there" in failure.value.remedy
    assert Path(cache.blob(file.digest) + ".incomplete").read_bytes() == data[:-6] + more
    cache.fetch(BreakingSource(data, None), file)
    assert Path(cache.blob(file.digest)).read_bytes() == data


class EndlessSource:
    """STAND-IN for a host that sends more than it listed; it counts the chunks that were read."""

    def __init__(self) -> None:
        self.read = 0

    @contextlib.contextmanager
    def open_file(self, _file: RemoteFile, _start: int) -> Iterator[tuple[io.BytesIO, bool]]:
        source = self

        class Stream(io.BytesIO):
            def read(self, _size: int | None = -1) -> bytes:
                source.read += 1
                return b"x" * 100 if source.read < 50 else b""

        yield Stream(), True


@pytest.mark.parametrize("here", [0, 100])
def test_no_more_is_written_than_was_listed(tmp_path: Path, here: int) -> None:
    file, source = RemoteFile("w.safetensors", 250, "a" * 64), EndlessSource()
    cache = ModelCache(str(tmp_path), MODEL)
    partial = Path(cache.blob(file.digest) + ".incomplete")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" * here)
    with pytest.raises(CopyError, match="more than the 250 bytes that were listed arrived"):
        cache.fetch(source, file)
    assert source.read == 3 - here // 100 and not list(partial.parent.iterdir())


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Return a file outside the cache that a user of the host wants root to write or to give away."""
    path = tmp_path / "outside" / "passwd"
    path.parent.mkdir()
    path.write_text("root")
    return path


def _model_folder(home: Path) -> Path:
    folder = Path(ModelCache(str(home), MODEL).folder)
    for name in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (folder / name).mkdir(parents=True)
    return folder


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe"])
@pytest.mark.parametrize("suffix", [".incomplete", ""])
def test_a_file_is_not_written_through_a_planted_name(tmp_path: Path, victim: Path, kind: str, suffix: str) -> None:
    home = tmp_path / "home"
    name = _model_folder(home) / "blobs" / (_listed(FILES)[0].digest + suffix)
    if kind == "link":
        name.symlink_to(victim)
    elif kind == "hard link":
        name.hardlink_to(victim)
    else:
        os.mkfifo(name)
    cache = _fetch(Source(FILES), home)
    assert victim.read_text() == "root"
    for file in _listed(FILES):
        cache.check(file)


@pytest.mark.parametrize("name", ["refs/main", "refs/main.partial"])
def test_a_reference_is_not_written_through_a_link(tmp_path: Path, victim: Path, name: str) -> None:
    folder = _model_folder(tmp_path / "home")
    (folder / name).symlink_to(victim)
    _fetch(Source(FILES), tmp_path / "home")
    assert victim.read_text() == "root" and (folder / "refs/main").read_text() == COMMIT
    assert not (folder / "refs/main").is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link to another user")
@pytest.mark.parametrize("place", ["..", "blobs", "refs", "snapshots", f"snapshots/{COMMIT}/sub"])
def test_a_folder_that_is_a_link_of_the_owner_is_refused(tmp_path: Path, victim: Path, place: str) -> None:
    home = tmp_path / "home"
    folder = _model_folder(home)
    link = folder.parent if place == ".." else folder / place
    if link.exists():
        link.rename(tmp_path / "moved")
    link.symlink_to(victim.parent)
    os.chown(link, 4321, 4321, follow_symlinks=False)
    with pytest.raises(CopyError, match="does not belong to root"):
        _fetch(Source(FILES), home)
    assert [path.name for path in victim.parent.iterdir()] == ["passwd"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_only_files_of_the_cache_get_its_owner(tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user replaces a folder by a link after its files were listed and before they get their owner."""
    home = tmp_path / "home"
    sub = _model_folder(home) / "snapshots" / COMMIT / "sub"
    sub.mkdir()
    (sub / "passwd").touch()
    (sub.parent / "hard").hardlink_to(victim)
    change = os.chown

    def race(path: str, *args: int, **options: bool | int) -> None:
        if Path(path).name == "passwd" and not sub.is_symlink():
            sub.rename(tmp_path / "moved")
            sub.symlink_to(victim.parent)
        change(path, *args, **options)

    monkeypatch.setattr(os, "chown", race)
    cache = ModelCache(str(home), MODEL, 4321, 4321)
    cache.publish("main", COMMIT, [])
    assert (victim.stat().st_uid, victim.parent.stat().st_uid) == (0, 0)
    assert (tmp_path / "moved/passwd").stat().st_uid == 4321
    assert Path(cache.folder).stat().st_uid == (Path(cache.folder) / "refs/main").stat().st_uid == 4321


def test_a_file_in_the_place_of_a_link_is_replaced(tmp_path: Path) -> None:
    beside = _model_folder(tmp_path) / "snapshots" / COMMIT / "config.json"
    beside.write_text("written by a program that makes no links")
    _fetch(Source(FILES), tmp_path)
    assert beside.is_symlink() and beside.read_bytes() == FILES["config.json"]


def test_a_folder_in_the_place_of_a_link_is_reported(tmp_path: Path) -> None:
    (_model_folder(tmp_path) / "snapshots" / COMMIT / "config.json").mkdir()
    with pytest.raises(CopyError, match=r"config\.json: a folder named config\.json") as failure:
        _fetch(Source(FILES), tmp_path)
    assert failure.value.remedy == "remove it"


def test_hashes_are_gits_and_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert digest_of(str(tmp_path / "x"), "0" * 40) == hashlib.sha1(b"blob 3\0abc").hexdigest()
    assert digest_of(str(tmp_path / "x"), "0" * 64) == hashlib.sha256(b"abc").hexdigest()


HOSTILE_FILES = [
    ["../../../etc/cron.d/x.json", 4, "a" * 64],
    ["/etc/x.json", 4, "a" * 64],
    ["a//x.json", 4, "a" * 64],
    ["./x.json", 4, "a" * 64],
    ["a/../../x.json", 4, "a" * 64],
    ["x\nroot.json", 4, "a" * 64],
    ["x\x1b[2J.json", 4, "a" * 64],
    ["..\\x.json", 4, "a" * 64],
    ["", 4, "a" * 64],
    ["x" * 2000 + ".json", 4, "a" * 64],
    ["x.json", 4, "../../../../root/.ssh/authorized_keys"],
    ["x.json", 4, "a" * 64 + "\n"],
    ["x.json", 4, ["a"]],
    ["x.json", -1, "a" * 64],
    ["x.json", 1 << 50, "a" * 64],
    ["x.json", 10**400, "a" * 64],
    ["x.json", "4", "a" * 64],
    [["x.json"], 4, "a" * 64],
    ["x.json", 4],
    "x.json",
    None,
]


@pytest.mark.parametrize("listed", HOSTILE_FILES, ids=lambda each: ascii(each)[:40])
def test_names_that_would_leave_the_cache_are_refused(listed: object) -> None:
    good = ["config.json", 4, "b" * 40]
    assert checked_files([good], "host")[0].path == "config.json"
    with pytest.raises(CopyError, match="host: it lists") as caught:
        checked_files([good, listed], "host")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_a_file_that_is_a_folder_of_another_is_refused() -> None:
    """The first would be a link into blobs/, through which the second would be written."""
    with pytest.raises(CopyError, match="'a/b' as a file and as a folder"):
        checked_files([["a/b", 1, "a" * 40], ["a/b/c", 1, "b" * 40]], "host")


@pytest.mark.parametrize("commit", ["../../x", "main", "A" * 40, "a" * 40 + "\n", None, 7, ["a" * 40]])
def test_a_commit_is_a_hash(commit: object) -> None:
    with pytest.raises(CopyError, match="it names the commit"):
        checked_commit(commit, "host")

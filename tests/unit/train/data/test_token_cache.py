"""The token cache: content, damage, several processes at once, its size, and files that changed."""

from __future__ import annotations

import fcntl
import json
import mmap
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mixtral_run.errors import ConfigError, TrainingError
from mixtral_run.run_lock import mounts
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.cache import cache_folder, content_hash
from mixtral_run.train.data.cache.cache_folder import NAME, CacheFolder, default_folder
from mixtral_run.train.data.cache.content_hash import file_sha256, refuse_changed
from mixtral_run.train.data.cache.token_arrays import EncodedChunk, TokenArrays
from mixtral_run.train.data.cache.token_cache import CacheWriter, DamagedCacheError, TokenCache, open_cache
from mixtral_run.train.data.samples import Samples
from mixtral_run.train.data.templates.encoded import EncodedExample

EXAMPLES = [
    ([1, 70, 71, 72, 2], ((3, 5),)),
    ([1, 80, 2, 81, 90_000, 2], ((2, 3), (4, 6))),
    ([1, 5, 2], ((1, 3),)),
]
PLACES = ["line 1", "line 3", "Zeile 4"]
KEY = {"content": "abc"}
MOST = 2**40


def encoded() -> list[EncodedExample]:
    return [EncodedExample(np.asarray(tokens, np.int32), spans) for tokens, spans in EXAMPLES]


def fill(writer: CacheWriter, _: Callable[[str], None]) -> Mapping[str, Any]:
    """Two chunks, as of a stream."""
    for first, last in ((0, 2), (2, 3)):
        chunk = EncodedChunk.of(encoded()[first:last])
        writer.add(chunk, np.asarray([7, 2**64 - 1, 9][first:last], np.uint64), PLACES[first:last])
    return {"warnings": ["odd"]}


def refuse(writer: CacheWriter, _: Callable[[str], None]) -> Mapping[str, Any]:
    raise AssertionError("the cache was to be found")


def folder_of(path: Path, most_bytes: int = MOST, patience: float = 60.0) -> CacheFolder:
    return CacheFolder(path / NAME, most_bytes, patience)


def made(path: Path, key: Mapping[str, Any] = KEY, most_bytes: int = MOST) -> TokenCache:
    return folder_of(path, most_bytes).open_or_make(key, fill, Report.silent(), verify=True)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    first = made(tmp_path)
    again = folder_of(tmp_path).open_or_make(KEY, refuse, Report.silent(), verify=True)
    assert again.identity == first.identity and again.notes == {"warnings": ["odd"]}
    arrays = again.arrays
    assert len(arrays) == 3 and arrays.highest_id == 90_000
    assert [arrays.tokens_of(index, 99)[: len(tokens)].tolist() for index, (tokens, _) in enumerate(EXAMPLES)] == [
        tokens for tokens, _ in EXAMPLES
    ]
    assert arrays.spans.tolist() == [[3, 5], [2, 3], [4, 6], [1, 3]] and arrays.span_offsets.tolist() == [0, 1, 3, 4]
    assert arrays.digests.tolist() == [7, 2**64 - 1, 9]
    assert [arrays.place(index) for index in range(3)] == PLACES
    # A view of the file, not a copy.
    assert not arrays.tokens.flags.owndata and arrays.mapped is not None
    arrays.release()
    assert arrays.tokens.tolist() == [number for tokens, _ in EXAMPLES for number in tokens]
    in_memory = TokenArrays.of(PLACES, encoded())
    for length in (4, 8):
        rows = [Samples(each, length, 2) for each in (arrays, in_memory)]
        for index in range(3):
            one, other = (each.row(index) for each in rows)
            assert one.tokens.tolist() == other.tokens.tolist() and one.loss_mask.tolist() == other.loss_mask.tolist()


def test_rows_of_cached_tokens_are_written_out(tmp_path: Path) -> None:
    samples = Samples(made(tmp_path).arrays, 4, padding_id=2)
    assert samples.row(0).tokens.tolist() == [1, 70, 71, 72] and samples.row(0).labels.tolist() == [70, 71, 72, 2]
    assert samples.row(0).loss_mask.tolist() == [0, 0, 1, 1]
    # Truncated within its second learned span.
    assert samples.row(1).labels.tolist() == [80, 2, 81, 90_000] and samples.row(1).loss_mask.tolist() == [0, 1, 0, 1]
    assert samples.row(2).tokens.tolist() == [1, 5, 2, 2] and samples.row(2).loss_mask.tolist() == [1, 1, 0, 0]
    assert [samples.num_loss_tokens(index) for index in range(3)] == [2, 2, 2]
    assert (samples.num_tokens, samples.num_truncated, samples.longest, samples.num_padding_tokens) == (13, 1, 6, 2)
    chosen = Samples(made(tmp_path).arrays, 4, 2, chosen=np.asarray([2], np.int64))
    assert len(chosen) == 1 and chosen.row(0).tokens.tolist() == [1, 5, 2, 2] and chosen.num_tokens == 3


@pytest.mark.parametrize("array", ["tokens", "offsets", "spans", "span_offsets", "digests", "places", "place_offsets"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_cache_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], array: str, damage: str
) -> None:
    tmp_path /= "a long path " * 20  # which must not displace the name of the file
    folder = made(tmp_path).folder
    file = folder / f"{array}.bin"
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[:-1] if damage == "cut" else content)
    with pytest.raises(DamagedCacheError):
        open_cache(folder, verify=True)
    again = folder_of(tmp_path).open_or_make(KEY, fill, Report(), verify=True)
    assert again.arrays.tokens.tolist() == [number for tokens, _ in EXAMPLES for number in tokens]
    output = capsys.readouterr().out
    assert f"The token cache {folder} is damaged and is made again (" in output
    assert f"{array}.bin" in output
    assert sorted(path.name for path in folder.parent.iterdir() if path.name.endswith(".partial")) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"arrays": 5}', "[" * 10_000, '{"arrays": {}, "highest_id": 1}'])
def test_a_damaged_description_is_made_again(tmp_path: Path, text: str) -> None:
    folder = made(tmp_path).folder
    (folder / "cache.json").write_text(text)
    assert len(made(tmp_path).arrays) == 3
    assert json.loads((folder / "cache.json").read_text())["format"] == 1


def test_each_part_of_the_key_has_its_own_cache(tmp_path: Path) -> None:
    folders = {made(tmp_path, key).folder for key in (KEY, {"content": "abd"}, {**KEY, "encoding": "x"}, KEY)}
    assert len(folders) == 3


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fails(writer: CacheWriter, note: Callable[[str], None]) -> Mapping[str, Any]:
        fill(writer, note)
        raise ConfigError("broken data")

    with pytest.raises(ConfigError, match="broken data"):
        folder_of(tmp_path).open_or_make(KEY, fails, Report.silent(), verify=True)
    assert [path.name for path in (tmp_path / NAME).iterdir() if not path.name.startswith(".lock")] == []
    assert len(made(tmp_path).arrays) == 3


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("a file")
    with pytest.raises(ConfigError, match="token cache cannot be written") as caught:
        made(tmp_path)
    assert "--data-cache" in str(caught.value) and NAME in str(caught.value)


def test_the_oldest_caches_that_nobody_uses_are_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [{"content": str(number)} for number in range(4)]
    size = made(tmp_path, keys[0]).num_bytes
    folders = [made(tmp_path, key).folder for key in keys[:3]]
    for age, folder in zip((30, 10, 20), folders, strict=True):
        os.utime(folder / "cache.json", (time.time() - age,) * 2)
    left = tmp_path / NAME / f".{'0' * 32}.elsewhere-1.partial"
    left.mkdir()
    held = open_cache(folders[0], verify=False)
    os.utime(folders[0] / "cache.json", (time.time() - 30,) * 2)
    newest = folder_of(tmp_path, int(2.5 * size)).open_or_make(keys[3], fill, Report(), verify=True)
    # The first is the oldest but in use; the third was not used for longer than the second.
    assert [folder.is_dir() for folder in folders] == [True, False, False]
    assert len(held.arrays) == 3 and newest.folder.is_dir()
    assert not left.exists(), "what a dead process left is removed"
    output = capsys.readouterr().out
    assert f"in {newest.folder}; all 2 there take" in output and f"`rm -r {tmp_path / NAME}` removes all" in output
    assert "of caches that were not used for the longest time were removed" in output


def test_what_another_host_is_making_stays_where_locks_are_those_of_one_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = made(tmp_path / "first").folder.name
    same, other = (tmp_path / NAME / f".{each}.gpu-07-4711.partial" for each in (name, "0" * 32))
    for folder in (same, other):
        folder.mkdir(parents=True)
    monkeypatch.setattr(mounts, "locks_reach_other_hosts", lambda *_: False)
    assert made(tmp_path).folder.name == name
    assert same.is_dir() and other.is_dir()
    monkeypatch.undo()
    made(tmp_path, {"content": "another"})
    assert not same.exists() and not other.exists()


def _make_slowly(path: Path, entered: Any, results: Any, dies: bool) -> None:
    def slow(writer: CacheWriter, note: Callable[[str], None]) -> Mapping[str, Any]:
        entered.put(os.getpid())
        if dies:
            os._exit(9)
        time.sleep(0.5)
        return fill(writer, note)

    cache = folder_of(path).open_or_make(KEY, slow, Report.silent(), verify=True)
    results.put((os.getpid(), cache.arrays.tokens.tolist()))


def test_one_process_makes_it_and_the_others_wait(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    entered, results = context.Queue(), context.Queue()
    started = [context.Process(target=_make_slowly, args=(tmp_path, entered, results, False)) for _ in range(4)]
    for process in started:
        process.start()
    found = [results.get(timeout=60) for _ in started]
    for process in started:
        process.join()
    assert entered.qsize() == 1
    assert {tuple(tokens) for _, tokens in found} == {tuple(number for tokens, _ in EXAMPLES for number in tokens)}


def test_the_end_of_the_process_that_makes_it_frees_the_others(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    entered, results = context.Queue(), context.Queue()
    dying = context.Process(target=_make_slowly, args=(tmp_path, entered, results, True))
    dying.start()
    dying.join()
    assert dying.exitcode == 9 and list((tmp_path / NAME).glob(".*.partial"))
    started = time.monotonic()
    assert len(made(tmp_path).arrays) == 3
    assert time.monotonic() - started < 5
    assert not list((tmp_path / NAME).glob(".*.partial"))


def test_a_process_that_does_not_get_on_is_not_waited_for_without_end(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, patience=0.5)
    folder.path.mkdir()
    held = [(folder.path / f".lock-{number:02d}").open("w+b") for number in range(64)]
    for file in held:
        file.write(b"process 4711 on gpu-09: 5 examples\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
    with pytest.raises(TrainingError, match="does not get on") as caught:
        folder.open_or_make(KEY, refuse, Report.silent(), verify=True)
    assert "process 4711 on gpu-09" in str(caught.value) and "--data-cache" in str(caught.value)


def test_a_large_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The known SHA-256 of "abc" repeated; then neither a changed byte nor a file put in its place goes unnoticed."""
    monkeypatch.setattr(content_hash, "HASHED_ALWAYS", 1000)
    monkeypatch.setattr(content_hash, "SETTLED_SECONDS", -1.0)
    reads = []
    whole = content_hash._whole
    monkeypatch.setattr(content_hash, "_whole", lambda path, before: reads.append(path) or whole(path, before))
    file, index = tmp_path / "x.jsonl", tmp_path / "index"
    index.mkdir()
    file.write_bytes(b"a" * 1_000_000)
    # FIPS 180: the SHA-256 of a million times "a".
    expected = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
    assert [file_sha256(file, index) for _ in range(3)] == [expected] * 3 and len(reads) == 1
    assert file_sha256(file, None) == expected and len(reads) == 2
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(500_000)
        opened.write(b"b")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = file_sha256(file, index)
    assert changed != expected
    with pytest.raises(ConfigError, match="changed while it was read"):
        refuse_changed(file, expected)
    (index / ".files.json").write_text("{broken")
    assert file_sha256(file, index) == changed
    # A file that changed just now may change again within the same time stamp.
    monkeypatch.setattr(content_hash, "SETTLED_SECONDS", 60.0)
    file.write_bytes(b"c" * 1_000_000)
    count = len(reads)
    assert file_sha256(file, index) == file_sha256(file, index) and len(reads) == count + 2


def test_where_the_folder_is_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert default_folder(tmp_path / "adapter") == tmp_path / NAME
    assert default_folder(Path("adapter")) == Path.cwd() / NAME
    assert default_folder(None) == tmp_path / "hf" / NAME
    monkeypatch.delenv("HF_HOME")
    assert str(os.getuid()) in default_folder(None).name
    (tmp_path / "file").write_text("")
    assert default_folder(tmp_path / "file" / "adapter") == default_folder(None)


@pytest.mark.parametrize("state", ["link", "writable", "file"])
def test_a_temporary_folder_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = default_folder(None)
    assert own.stat().st_mode & 0o777 == 0o700 and default_folder(None) == own
    own.rmdir()
    if state == "link":
        (tmp_path / "elsewhere").mkdir()
        own.symlink_to(tmp_path / "elsewhere")
    elif state == "file":
        own.touch()
    else:
        own.mkdir()
        own.chmod(0o777)
    with pytest.raises(ConfigError, match="may have been filled by another user"):
        default_folder(None)


def test_a_pipe_in_the_place_of_the_description_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cache.json")
    with pytest.raises(DamagedCacheError, match="damaged"):
        open_cache(tmp_path, verify=True)


def test_pages_are_released_after_256_rows() -> None:
    arrays = TokenArrays.of(PLACES, encoded())
    released: list[int] = []
    arrays.mapped = SimpleNamespace(madvise=released.append)  # type: ignore[assignment]
    for _ in range(511):
        assert arrays.tokens_of(1, 2).tolist() == [1, 80]
    assert released == [mmap.MADV_DONTNEED]
    arrays.tokens_of(2, 3)
    assert len(released) == 2


def test_sizes_in_words_and_the_time_of_a_stuck_process() -> None:
    assert [cache_folder._size(each) for each in (12_345_678, 99_999_999, 100_000_000, 2_500_000_000)] == [
        "12.3 MB", "100.0 MB", "0.1 GB", "2.5 GB",
    ]  # fmt: skip
    assert cache_folder._stuck(Path("lock"), "", 600.0).found == "none for 10 minutes (no word of it)"


def test_every_spot_of_a_large_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 spots of 2 bytes over 128 bytes: each of them decides. Its first and last bytes are among them."""
    monkeypatch.setattr(content_hash, "SPOT_BYTES", 2)
    file = tmp_path / "data"
    file.write_bytes(bytes(128))
    found = set()
    for at in range(128):
        content = bytearray(128)
        content[at] = 1
        file.write_bytes(content)
        found.add(content_hash._spots(file, 128))
    assert len(found) == 128
    assert (content_hash.HASHED_ALWAYS, content_hash.SPOTS) == (16_777_216, 64)
    assert sorted(content_hash._state(file)) == sorted(
        [128, file.stat().st_mtime_ns, file.stat().st_ctime_ns, file.stat().st_ino, file.stat().st_dev]
    )


def test_the_index_of_hashes_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("HASHED_ALWAYS", 3), ("SPOT_BYTES", 4), ("SETTLED_SECONDS", -10.0), ("MOST_FILES", 2)):
        monkeypatch.setattr(content_hash, name, value)
    for name in ("a", "b", "c", "small"):
        (tmp_path / name).write_bytes(b"x" * (3 if name == "small" else 70))
        file_sha256(tmp_path / name, tmp_path)
    index = json.loads((tmp_path / ".files.json").read_text())
    assert [Path(each).name for each in index] == ["b", "c"]

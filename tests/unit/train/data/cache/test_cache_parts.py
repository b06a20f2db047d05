"""Small parts of the token cache by themselves: what is damaged, who waits for whom, names, boundaries, and words."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mixtral_run.errors import ConfigError, TrainingError
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.cache import cache_folder, cached_examples, content_hash, token_cache, tokenize
from mixtral_run.train.data.cache.cache_folder import CacheFolder
from mixtral_run.train.data.cache.cached_examples import CachedExamples, ExampleCaches
from mixtral_run.train.data.cache.token_cache import DamagedCacheError, open_cache
from mixtral_run.train.data.cache.tokenize import TokenizingProgress, tokenized
from mixtral_run.train.data.reading.example import Example
from mixtral_run.train.data.reading.examples import ExampleStream
from mixtral_run.train.data.templates.encoded import EncodedExample
from tests.unit.train.data.test_token_cache import KEY, fill, made


def test_arrays_that_do_not_belong_together() -> None:
    """Two examples of 5 tokens, 3 spans and 7 bytes of places."""

    def arrays(**ends: list[int]) -> dict[str, Any]:
        given = {"offsets": [0, 2, 5], "span_offsets": [0, 1, 3], "place_offsets": [0, 3, 7]} | ends
        sizes = {"digests": 2, "tokens": 5, "spans": 6, "places": 7}
        return {name: np.asarray(each) for name, each in given.items()} | {
            name: np.zeros(size) for name, size in sizes.items()
        }

    token_cache._check_offsets(arrays())
    for name, end in (("offsets", 5), ("span_offsets", 3), ("place_offsets", 7)):
        for wrong in ([0, end], [0, 1, 1, end], [1, 1, end], [-1, 1, end], [0, 1, end - 1], [0, 1, end + 1]):
            with pytest.raises(ValueError, match=rf"^{name}.bin: does not describe 2 examples"):
                token_cache._check_offsets(arrays(**{name: wrong}))


def test_files_up_to_a_size_are_compared_with_their_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens take 56 bytes, the digests 24. A larger file is known by its size alone."""
    folder = made(tmp_path).folder
    tokens = (folder / "tokens.bin").stat().st_size
    assert tokens == 4 * (5 + 6 + 3)
    (folder / "tokens.bin").write_bytes(bytes(tokens))
    monkeypatch.setattr(token_cache, "CHECKED_BYTES", tokens - 1)
    assert open_cache(folder, verify=True).arrays.tokens.tolist() == [0] * 14
    monkeypatch.setattr(token_cache, "CHECKED_BYTES", tokens)
    with pytest.raises(DamagedCacheError) as caught:
        open_cache(folder, verify=True)
    # Of zeros the CRC-32 is not zero: a start value of all ones.
    assert str(caught.value.found).startswith("tokens.bin: expected CRC-32 ") and caught.value.found[-8:] != "0" * 8
    (folder / "tokens.bin").write_bytes(bytes(tokens + 1))
    with pytest.raises(DamagedCacheError) as caught:
        open_cache(folder, verify=False)
    assert caught.value.found == "tokens.bin: expected 56 bytes; found 57"


def test_a_cache_in_use_is_marked(tmp_path: Path) -> None:
    folder = made(tmp_path).folder
    os.utime(folder / "cache.json", (5.0, 5.0))
    assert cache_folder._last_use(folder) == 5.0 and cache_folder._last_use(tmp_path / "gone") == 0.0
    cache = open_cache(folder, verify=False)
    assert cache_folder._last_use(folder) > 5.0
    assert not cache_folder._remove_unless_used(folder) and folder.is_dir()
    del cache
    assert cache_folder._remove_unless_used(folder) and not folder.exists()
    assert not cache_folder._remove_unless_used(folder)
    assert [each.name for each in folder.parent.iterdir() if not each.name.startswith(".lock")] == []
    assert token_cache.folder_bytes(tmp_path / "gone") == 0


def test_sizes_are_reported_and_caches_in_use_may_take_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    for number in range(4):
        folders.append(tmp_path / f"{number:032x}")
        folders[-1].mkdir()
        (folders[-1] / "cache.json").write_bytes(bytes(300_000))
        os.utime(folders[-1] / "cache.json", (10.0 + number, 10.0 + number))
    (tmp_path / ("0" * 31)).mkdir()  # no cache: its name is too short

    def left(most: int) -> tuple[list[int], list[str]]:
        CacheFolder(tmp_path, most, 60.0)._make_space(folders[1], Report())
        lines = " ".join(capsys.readouterr().out.split()).replace("! ", "\n").splitlines()
        return [number for number, each in enumerate(folders) if each.exists()], lines

    # Exactly as much as there is; a byte less, for which the oldest goes; and then the newest alone stays.
    assert left(1_200_000)[0] == [0, 1, 2, 3]
    found, lines = left(1_199_999)
    total = f"`rm -r {tmp_path}` removes all"
    assert found == [1, 2, 3] and lines == [
        f"Token cache: 0.3 MB in {folders[1]}; all 3 there take 0.9 MB of at most 1.2 MB (--data-cache-gib); {total} "
        "0.3 MB of caches that were not used for the longest time were removed"
    ]
    found, lines = left(300_000)
    assert found == [1] and "0.6 MB of caches" in lines[0] and len(lines) == 1
    found, (first, second) = left(299_999)
    assert found == [1] and "removed" not in first
    assert second == f"The token caches in {tmp_path} take more than --data-cache-gib, and are in use"


def test_what_the_system_says_about_the_folder(tmp_path: Path) -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        full = cache_folder._unwritable(tmp_path, OSError(number, "full", "/disk/file"))
        assert (full.what[:17], full.where, full.found) == ("The disk is full:", "/disk/file", "full")
    other = cache_folder._unwritable(tmp_path, OSError("odd"))
    assert (other.what, other.where, other.found) == ("The token cache cannot be written.", str(tmp_path), "odd")
    assert cache_folder._unwritable(tmp_path, OSError(errno.EACCES, "denied")).found == "denied"


@pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.EEXIST, errno.EACCES])
def test_only_a_cache_that_is_there_already_is_no_error(number: int) -> None:
    def rename(_: object) -> None:
        raise OSError(number, "no")

    with pytest.raises(OSError, match="no") as caught:
        cache_folder._rename(SimpleNamespace(rename=rename), Path("x"))  # type: ignore[arg-type]
    assert (type(caught.value) is FileExistsError) == (number != errno.EACCES)


def test_lock_files_are_named_after_the_first_digits(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, 1, 1.0)
    # 0x0041 is 65, 0xffff is 65,535: of 64 files the numbers 1 and 63.
    for name, number in (("0041zz", "01"), ("00400", "00"), ("ffff", "63"), ("000a1", "10"), ("none", "00")):
        assert folder._lock_file(name) == tmp_path / f".lock-{number}"


class Clock:
    """A clock that only `sleep` and this test move."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    for module in (cache_folder, tokenize):
        monkeypatch.setattr(module, "time", found)
    return found


def test_a_process_writes_how_far_it_is_every_two_seconds(tmp_path: Path, clock: Clock) -> None:
    descriptor = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    note, seen = cache_folder._Note(descriptor), []
    assert note.take() and note.is_held
    for text, seconds in (("a", 1.9), ("b", 0.1), ("c" * 400, 2.0), ("d", 2.0)):
        clock.now += seconds
        note.progress(text)
        seen.append(note.read())
    os.close(descriptor)
    begin = f"process {os.getpid()} on {os.uname().nodename}: "
    assert seen == [f"{begin}it has just begun", f"{begin}b", f"{begin}{'c' * 400}"[:300], f"{begin}d"]
    assert (tmp_path / "lock").stat().st_size == 300


def test_those_that_wait_report_every_five_seconds_and_end_after_their_patience(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other process writes a word in its 10th second, and then no more."""
    monkeypatch.setattr(cache_folder._Note, "take", lambda _: False)
    monkeypatch.setattr(cache_folder._Note, "read", lambda _: "half" if clock.now >= 110 else "")
    with pytest.raises(TrainingError) as caught:
        CacheFolder(tmp_path, 1, 12.0).open_or_make(KEY, fill, Report(), verify=True)
    assert 122.0 < clock.now < 122.5 and caught.value.found == "none for 0 minutes (half)"
    lines = [line.rpartition("data: ")[2] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["it has just begun", "half", "half", "half"]
    assert cache_folder.POLL_SECONDS == 0.2


def test_progress_says_less_at_the_end_only_after_a_line(clock: Clock) -> None:
    said: list[str] = []
    progress = TokenizingProgress(100, said.append, lambda _: None)
    progress.advance(1)
    progress.finish()
    assert said == []
    clock.now += 5.0
    progress.advance(149)
    progress.finish()
    assert said == ["  tokenizing: 150 of about 150 (100%) examples, 30 a second"]
    assert TokenizingProgress(None, said.append, said.append)._text(clock.now) == "0 examples, 0 a second"


def test_a_row_shows_progress_in_place_of_lines(clock: Clock) -> None:
    said: list[str] = []
    for about, share in ((100, 0.25), (20, 1.0), (None, -1.0)):
        row = SimpleNamespace(text="", share=0.0)
        progress = TokenizingProgress(about, said.append, lambda _: None, row)  # type: ignore[arg-type]
        clock.now += 60
        progress.advance(25)
        assert row.share == share and row.text.startswith("25")
        progress.finish()
    assert said == []


class Pool:
    """STAND-IN for a pool of processes that tells how many chunks wait when the first is taken."""

    def __init__(self, *_: object, **__: object) -> None:
        self.submitted: list[int] = []

    def submit(self, _: Callable[..., object], chunk: list[Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self.submitted.append(len(chunk))
        future.set_result(SimpleNamespace(num_examples=len(self.submitted)))
        return future

    def shutdown(self, **given: bool) -> None:
        assert given == {"wait": True, "cancel_futures": True}


def test_a_few_chunks_for_each_process_are_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 chunks of 2 examples: with 2 processes and 1 ahead of each, 3 wait when the first is yielded."""
    pool = Pool()
    monkeypatch.setattr(tokenize, "ProcessPoolExecutor", lambda *_, **__: pool)
    monkeypatch.setattr(tokenize, "CHUNK", 2)
    monkeypatch.setattr(tokenize, "CHUNKS_AHEAD", 1)
    monkeypatch.setattr(tokenize, "FEW", 5)
    found: list[int] = []
    stream = tokenized(((0, each) for each in range(16)), SimpleNamespace(), found.append, 2)  # type: ignore[arg-type, misc]
    assert next(stream) is not None and len(pool.submitted) == 3
    assert len(list(stream)) == 7 and pool.submitted == [2] * 8 and found == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(("examples", "processes", "here"), [(4, 2, True), (5, 2, False), (9, 1, True)])
def test_few_examples_are_tokenized_here(
    monkeypatch: pytest.MonkeyPatch, examples: int, processes: int, here: bool
) -> None:
    monkeypatch.setattr(tokenize, "FEW", 5)
    for name in ("_here", "_in_processes"):
        chunk = SimpleNamespace(num_examples=1, name=name)
        monkeypatch.setattr(tokenize, name, lambda *_, chunk=chunk: iter([chunk]))
    stream = tokenized(((0, each) for each in range(examples)), None, lambda _: None, processes)  # type: ignore[arg-type, misc]
    assert [each.name for each in stream] == ["_here" if here else "_in_processes"]  # type: ignore[attr-defined]


def test_sizes_of_chunks_and_of_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (tokenize.CHUNK, tokenize.FEW, tokenize.CHUNKS_AHEAD, tokenize.MOST_PROCESSES) == (256, 4096, 4, 16)
    asked: list[int] = []

    def in_processes(_: object, __: object, count: int) -> Iterator[Any]:
        asked.append(count)
        yield from ()

    monkeypatch.setattr(tokenize, "_in_processes", in_processes)
    for cpus in (3, 15, 16, 17, 40):
        monkeypatch.setattr(tokenize, "_usable_cpus", lambda cpus=cpus: cpus)
        list(tokenized(((0, each) for each in range(4096)), None, lambda _: None))  # type: ignore[arg-type, misc]
    assert asked == [3, 15, 16, 16, 16]


def caches(tmp_path: Path) -> ExampleCaches:
    found = object.__new__(ExampleCaches)
    found._folder = CacheFolder(tmp_path / "none", 1, 1.0)
    return found


def test_a_file_is_known_by_its_name_only_among_several(tmp_path: Path) -> None:
    files = []
    for name in ("a.jsonl.gz", "b.csv"):
        (tmp_path / name).write_bytes(b"abc")
        files.append(str(tmp_path / name))
    # FIPS 180: the SHA-256 of "abc".
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    sources = [
        cached_examples.parse_source(each) if hasattr(cached_examples, "parse_source") else each for each in files
    ]
    del sources
    stream = cached_examples.read_examples(files)
    both = caches(tmp_path)._hashed(stream.sources, "data_path")
    assert [each.key for each in both] == [[0, "a.jsonl.gz", "", sha256], [1, "b.csv", "", sha256]]
    one = caches(tmp_path)._hashed(stream.sources[:1], "data_path")
    assert [each.key for each in one] == [[0, ".jsonl.gz", "", sha256]]
    folder = cached_examples.read_examples([str(tmp_path)])
    assert [each.key[:2] for each in caches(tmp_path)._hashed(folder.sources, "data_path")] == [
        [0, "a.jsonl.gz"], [0, "b.csv"],
    ]  # fmt: skip
    (tmp_path / "a.jsonl.gz").unlink()
    with pytest.raises(ConfigError):
        caches(tmp_path)._hashed(stream.sources, "data_path")


def test_the_number_of_lines_is_known_of_files_of_lines(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.json")]
    for path in paths:
        path.write_text("{}\n{}\n{}")

    def about(*given: Path) -> int | None:
        return cached_examples._about([SimpleNamespace(hashes=dict.fromkeys(given, ""))])  # type: ignore[list-item]

    assert (about(*paths[:2]), about(*paths), about(paths[2])) == (4, None, None)
    assert about(tmp_path / "gone.jsonl") == 0


def test_examples_have_the_number_of_their_source() -> None:
    stream: Any = SimpleNamespace(counts_by_source=[0, 0, 0], problems=SimpleNamespace(num_examples=0))
    stream.options = SimpleNamespace(skip_bad_examples=False)
    stream.numbered = lambda: ExampleStream.numbered(stream)

    def examples(sources: list[int], bad_at: int) -> Iterator[str]:
        for number, source in enumerate(sources):
            stream.counts_by_source[source] += 1
            stream.problems.num_examples += number == bad_at
            yield f"example {number}"

    stream.examples = lambda: examples([0, 0, 2, 2], 9)
    assert list(cached_examples._numbered(stream)) == [
        (0, "example 0"), (0, "example 1"), (2, "example 2"), (2, "example 3"),
    ]  # fmt: skip
    stream.counts_by_source = [0, 0, 0]
    stream.examples = lambda: examples([0, 1, 1], 1)
    assert list(cached_examples._numbered(stream)) == [(0, "example 0")]
    stream.options.skip_bad_examples = True
    assert len(list(cached_examples._numbered(stream))) == 3


@pytest.mark.parametrize(
    ("tokenizer_size", "highest", "refused"),
    [(100, 99, False), (101, 5, True), (50, 100, True), (100, 0, False), (50, 99, False)],
)
def test_ids_beyond_the_vocabulary(
    monkeypatch: pytest.MonkeyPatch, tokenizer_size: int, highest: int, refused: bool
) -> None:
    """The model has rows for the ids 0 to 99."""
    asked: list[Any] = []
    monkeypatch.setattr(cached_examples, "load_tokenizer", lambda _: "tokenizer")
    monkeypatch.setattr(cached_examples, "check_token_ids", lambda *given: asked.append(given))
    found = object.__new__(ExampleCaches)
    found._base = SimpleNamespace(architecture=SimpleNamespace(vocab_size=100), tokenizer="folder")  # type: ignore[assignment]
    cache = SimpleNamespace(notes={"tokenizer_size": tokenizer_size}, arrays=SimpleNamespace(highest_id=highest))
    found._check_ids(cache, "where")  # type: ignore[arg-type]
    assert asked == ([("tokenizer", highest, 100, "folder", "where")] if refused else [])


def test_of_preferences_every_second_row_is_an_example() -> None:
    cache: Any = SimpleNamespace(arrays=SimpleNamespace(digests=np.asarray([1, 1, 2, 2], np.uint64)))
    given: Any = (cache, "where", (), (), (), 0, "sha", None)
    assert CachedExamples(*given, 2).digests.tolist() == [1, 2]
    assert CachedExamples(*given, 1).digests.tolist() == [1, 1, 2, 2]


def test_chunks_of_examples_of_preferences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer is a row with the digest and the place of its example; what is refused takes none along."""
    monkeypatch.setattr(tokenize, "content_digest", lambda example: len(example.place))
    good, bad = Example("line 1", (), text="a"), Example("line 22", (), text="bad")
    monkeypatch.setattr(Example, "answers", lambda each: (each, None, each))

    def encode(example: Example) -> EncodedExample:
        if example.text == "bad":
            raise ConfigError("No.")
        return EncodedExample(np.asarray([1, 2], np.int32), ((0, 1),))

    found = tokenize._tokenize(encode, [(3, good), (4, bad)])
    assert (found.places, found.sources, found.num_examples) == (["line 1"] * 3, [3] * 3, 2)
    assert found.digests.tolist() == [6] * 3 and found.encoded.lengths.tolist() == [2, len(tokenize.NOTHING.tokens), 2]
    assert found.problems == [(4, "line 22", "No.")]


def test_hashes_are_kept_of_settled_files_by_state_and_spots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_hash, "HASHED_ALWAYS", 3)
    monkeypatch.setattr(content_hash, "SPOT_BYTES", 1)
    file = tmp_path / "file"
    file.write_bytes(b"x" * 70)
    changed = max(file.stat().st_mtime, file.stat().st_ctime)
    for later, kept in ((1.5, False), (2.5, True)):
        monkeypatch.setattr(content_hash, "time", SimpleNamespace(time=lambda later=later: changed + later))
        content_hash.file_sha256(file, tmp_path)
        assert (tmp_path / ".files.json").exists() is kept
    entry = json.loads((tmp_path / ".files.json").read_text())[str(file)]
    for name, value in (("state", [1]), ("spots", "~"), ("spots", ""), ("sha256", "KEPT")):
        (tmp_path / ".files.json").write_text(json.dumps({str(file): {**entry, "sha256": "KEPT", name: value}}))
        assert content_hash.file_sha256(file, tmp_path) == ("KEPT" if name == "sha256" else entry["sha256"])
    for text in ("[]", "[" * 100_000):
        (tmp_path / ".files.json").write_text(text)
        assert content_hash.file_sha256(file, tmp_path) == entry["sha256"]
    assert [each.name for each in tmp_path.iterdir() if each.name.endswith(".partial")] == []


def test_a_data_file_that_changes_or_goes(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    content_hash.refuse_changed(file, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    with pytest.raises(ConfigError, match="changed while it was read"):
        content_hash._whole(file, [3, 0, 0, 0, 0])
    file.unlink()
    with pytest.raises(ConfigError, match="cannot be read any more") as caught:
        content_hash.refuse_changed(file, "")
    assert caught.value.found == "No such file or directory"

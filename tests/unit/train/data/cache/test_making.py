"""A cache that is made: what is counted, what may be removed meanwhile, and how long others wait."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from mixtral_run.terminal.report import Report
from mixtral_run.train.data.cache import cache_folder, cached_examples, content_hash, token_cache
from mixtral_run.train.data.cache.cache_folder import CacheFolder
from mixtral_run.train.data.cache.cached_examples import ExampleCaches
from mixtral_run.train.data.cache.token_arrays import EncodedChunk
from mixtral_run.train.data.cache.token_cache import CacheWriter
from mixtral_run.train.data.reading.examples import ExampleStream
from mixtral_run.train.data.templates.encoded import EncodedExample


@contextlib.contextmanager
def activity(_: str) -> Any:
    yield "row"


def test_examples_that_the_template_refuses_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 and 7 examples one of the first and two of the second source are refused; each is a problem by its place."""
    problems = [(0, "line 1", "odd"), (1, "line 2", "odd"), (1, "line 9", "odder")]
    chunks = [
        SimpleNamespace(encoded="e1", digests="d1", places=["p1"], problems=problems[:1]),
        SimpleNamespace(encoded="e2", digests="d2", places=["p2"], problems=problems[1:]),
    ]
    monkeypatch.setattr(cached_examples, "tokenized", lambda *_: iter(chunks))
    monkeypatch.setattr(cached_examples, "_numbered", lambda _: iter(()))
    checked: list[Any] = []
    monkeypatch.setattr(cached_examples, "refuse_changed", lambda *given: checked.append(given))
    noted: list[Any] = []
    stream: Any = MagicMock(counts_by_source=[5, 7])
    stream.problems.add.side_effect = lambda place, lines: noted.append((place, lines))
    stream.refuse = partial(ExampleStream.refuse, stream)
    stream.remarks_on_content.return_value = ["a remark"]
    found = object.__new__(ExampleCaches)
    found._report, found._encoding = MagicMock(activity=activity), MagicMock()  # type: ignore[assignment]
    found._encoding.facts.return_value = {"padding_id": 2}  # type: ignore[attr-defined]
    files: Any = [SimpleNamespace(hashes={Path("a"): "1", Path("b"): "2"}), SimpleNamespace(hashes={Path("c"): "3"})]
    monkeypatch.setattr(cached_examples, "_about", lambda _: None)
    writer = MagicMock()
    notes = found._make(stream, files)(writer, lambda _: None)
    assert notes == {"counts": [4, 5], "remarks": ["a remark"], "padding_id": 2}
    assert [each.args for each in writer.add.call_args_list] == [("e1", "d1", ["p1"]), ("e2", "d2", ["p2"])]
    assert noted == [(place, [problem]) for _, place, problem in problems]
    assert checked == [(Path("a"), "1"), (Path("b"), "2"), (Path("c"), "3")] and stream.raise_problems.called


def test_what_is_being_made_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = tmp_path / ("a" * 32)
    for name in (f".{'a' * 32}.gpu-1.partial", f".{'b' * 32}.gpu-1.partial", f".{'a' * 31}c.gpu-1.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / f".{'d' * 32}.x.partial").touch()
    newest.mkdir()
    (newest / "cache.json").touch()
    asked: list[str] = []
    monkeypatch.setattr(CacheFolder, "_remove_if_nobody_makes_it", lambda _, left: asked.append(left.name[1:33]))
    CacheFolder(tmp_path, 10**9, 60.0)._make_space(newest, Report.silent())
    assert sorted(asked) == ["a" * 31 + "c", "b" * 32]


@pytest.mark.parametrize("free", [True, False])
def test_a_leftover_goes_if_its_lock_is_free_on_all_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: bool
) -> None:
    left = tmp_path / f".{'0' * 32}.gpu-1.partial"
    left.mkdir()
    monkeypatch.setattr(cache_folder, "reaches_other_hosts", lambda _: free)
    folder = CacheFolder(tmp_path, 10**9, 60.0)
    folder._remove_if_nobody_makes_it(left)
    assert left.exists() is not free and (tmp_path / ".lock-00").exists()
    left.mkdir(exist_ok=True)

    def held(*_: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr(cache_folder.fcntl, "flock", held)
    folder._remove_if_nobody_makes_it(left)
    assert left.exists()


def test_sizes_and_times() -> None:
    assert (token_cache.BLOCK_BYTES, cached_examples.BLOCK_BYTES, content_hash.BLOCK_BYTES) == (8_388_608,) * 3
    assert (token_cache.CHECKED_BYTES, cache_folder.NAME_LENGTH, cache_folder.NUM_LOCKS) == (8_589_934_592, 32, 64)
    assert cache_folder._stuck(Path("lock"), "half", 6000.0).found == "none for 100 minutes (half)"
    assert (content_hash.SPOT_BYTES, content_hash.SETTLED_SECONDS, content_hash.MOST_FILES) == (65_536, 2.0, 1000)


def test_a_cache_is_known_by_its_key_in_any_order_and_may_be_empty(tmp_path: Path) -> None:
    """Of no examples the highest id is 0, as of those with the id 0 alone."""
    folder = CacheFolder(tmp_path, 10**9, 60.0)
    first = folder.open_or_make({"a": 1, "b": {"c": 2, "d": 3}}, lambda *_: {}, Report.silent(), verify=True)
    assert (len(first.arrays), first.arrays.highest_id, first.arrays.place_offsets.tolist()) == (0, 0, [0])

    def refuse(*_: object) -> Any:
        raise AssertionError("it was to be found")

    again = folder.open_or_make({"b": {"d": 3, "c": 2}, "a": 1}, refuse, Report.silent(), verify=True)
    assert again.folder == first.folder

    def fill(writer: CacheWriter, _: object) -> dict[str, Any]:
        for tokens in ([5, 3], [0, 2]):
            chunk = EncodedChunk.of([EncodedExample(np.asarray(tokens, np.int32), ())])
            writer.add(chunk, np.asarray([1], np.uint64), ["p"])
        return {}

    assert folder.open_or_make({"x": 1}, fill, Report.silent(), verify=True).arrays.highest_id == 5

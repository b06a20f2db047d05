"""Checkpoints of a run in a store: whole or not there, continued, removed as here, and never lost here."""

from __future__ import annotations

import json
import shutil
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral_run.errors import ConfigError, MixtralRunError, TrainingError, WeightsError
from mixtral_run.terminal.report import Report
from mixtral_run.weights.store import problems, run_mirror, transfer
from mixtral_run.weights.store.local import LocalCopy
from mixtral_run.weights.store.run_mirror import Retention, RunMirror
from mixtral_run.weights.store.runs import bring_back, complete_iterations
from tests.unit.train.checkpoints.test_newest_good import add
from tests.unit.weights.store.flaky_store import FlakyFileSystem, flaky_store, no_fault

MARKER = "mixtral_run_complete.json"
ALL = Retention(None, keep_best=False)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "PAUSES", (0.0,))
    monkeypatch.setattr(run_mirror, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(run_mirror, "PAUSE_SECONDS", 0.01)


@pytest.fixture
def local(tmp_path: Path) -> LocalCopy:
    folder = tmp_path / "outputs/run-1/run"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"iteration": 1}\n')
    return LocalCopy(folder)


def mirrored(
    local: LocalCopy,
    fs: FlakyFileSystem,
    retention: Retention = ALL,
    seconds: Callable[[], float | None] = lambda: None,
) -> list[str]:
    """Copy everything that is there, and return what was said."""
    store, _ = flaky_store()
    store = type(store)(fs, store.root, store.url)
    said: list[str] = []
    mirror = RunMirror(store, local, complete_iterations(store, store.objects()), retention, said.append)
    mirror.start()
    mirror.finish(seconds)
    return said


def whole_in_store(fs: FlakyFileSystem) -> set[int]:
    """The iterations whose marker is there. Each must have all its bytes; the oracle is zlib, on the store's bytes."""
    found = set()
    for path, file in list(fs.store.items()):
        if path.endswith(MARKER):
            for name, each in json.loads(file.getvalue())["files"].items():
                content = fs.store[f"/bucket/run/{name}"].getvalue()
                assert f"{zlib.crc32(content):08x}" == each["crc32"] and len(content) == each["size"]
            found.add(int(path.split("iter_")[1][:7]))
    return found


def test_a_reader_never_sees_half_a_checkpoint(local: LocalCopy) -> None:
    _, fs = flaky_store()
    seen: list[set[int]] = []
    fs.hook = lambda *_: seen.append(whole_in_store(fs))
    for iteration in (10, 20):
        add(local.folder, iteration)
    said = mirrored(local, fs)
    written = fs.written()
    # The newest is copied first. Its marker comes after its files, and the name of the newest after that.
    assert written.index(f"iter_0000020/{MARKER}") < written.index("iter_0000010/.metadata")
    for name in ("__0_0.distcp", ".metadata", "mixtral_run.json"):
        assert written.index(f"iter_0000020/{name}") < written.index(f"iter_0000020/{MARKER}")
    assert whole_in_store(fs) == {10, 20} and {20} in seen
    assert fs.store["/bucket/run/latest_checkpointed_iteration.txt"].getvalue() == b"20\n"
    assert fs.store["/bucket/run/metrics.jsonl"].getvalue() == (local.folder / "metrics.jsonl").read_bytes()
    assert sum(line.startswith("copied s3://bucket/run/iter_") for line in said) == 2
    assert not local.sending.exists()


def test_a_copy_that_was_cut_off_continues_with_the_missing_files(local: LocalCopy) -> None:
    _, fs = flaky_store()
    folder = add(local.folder, 10)
    add_tokenizer(local)

    def cut(what: str, path: str) -> None:
        if path.endswith("mixtral_run.json"):
            raise PermissionError("403")

    fs.hook = cut
    with pytest.raises(ConfigError) as error:
        mirrored(local, fs)
    assert error.value.exit_code == 2
    assert "not in the store: iter_0000010" in str(error.value) and str(local.folder) in str(error.value)
    assert whole_in_store(fs) == set() and (folder / "mixtral_run.json").is_file()
    fs.hook = no_fault
    fs.calls.clear()
    # One file that arrived has changed in the store since: another program wrote there.
    fs.store["/bucket/run/iter_0000010/.metadata"].write(b"longer than before, and not ours")
    mirrored(local, fs)
    again = [name for name in fs.written() if name.startswith("iter_")]
    assert sorted(again) == [f"iter_0000010/{name}" for name in (".metadata", "mixtral_run.json", MARKER)]
    assert whole_in_store(fs) == {10}


def add_tokenizer(local: LocalCopy) -> None:
    (local.folder / "tokenizer").mkdir()
    (local.folder / "tokenizer/tokenizer.json").write_text("{}")


def test_a_store_that_fails_for_a_while_costs_nothing(local: LocalCopy) -> None:
    _, fs = flaky_store()
    add(local.folder, 10)
    left = [7]

    def busy(what: str, path: str) -> None:
        if what == "write" and left[0]:
            left[0] -= 1
            raise OSError(16, "An error occurred (503): Slow Down")

    fs.hook = busy
    said = mirrored(local, fs)
    assert whole_in_store(fs) == {10}
    assert [line for line in said if line.startswith("!")] and "answers again" in " ".join(said)
    assert sum("503" in line for line in said) == 1


@pytest.mark.parametrize("stopped", [True, False])
def test_what_is_not_copied_is_named(local: LocalCopy, monkeypatch: pytest.MonkeyPatch, stopped: bool) -> None:
    """The store stays away: at the end of a run, or after the time that a stop leaves."""
    _, fs = flaky_store()
    for iteration in (10, 20):
        add(local.folder, iteration)
    monkeypatch.setattr(run_mirror, "FINISH_SECONDS", 1000.0 if stopped else 0.3)

    def away(what: str, path: str) -> None:
        if what == "write" and "iter_0000010" in path:
            raise TimeoutError("no answer")

    fs.hook = away
    ends = time.monotonic() + 0.3
    with pytest.raises(TrainingError) as error:
        mirrored(local, fs, seconds=(lambda: ends - time.monotonic()) if stopped else (lambda: None))
    # 6 is no code that a restart cannot cure: the next attempt copies the rest.
    assert error.value.exit_code == 6 and "--resume auto" in str(error.value)
    assert "not in the store: iter_0000010\n" in f"{error.value}\n" and whole_in_store(fs) == {20}


def test_removal_here_waits_for_no_copy_and_holds_there(local: LocalCopy) -> None:
    """--keep-last 2, an older checkpoint of another machine in the store, and one removed here while it is copied."""
    _, fs = flaky_store()
    add(local.folder, 5)
    mirrored(local, fs)
    assert whole_in_store(fs) == {5}
    shutil.rmtree(local.folder / "iter_0000005")
    add(local.folder, 10)
    gone = threading.Event()

    def remove(what: str, path: str) -> None:
        if what == "write" and path.endswith("iter_0000010/__0_0.distcp") and not gone.is_set():
            shutil.rmtree(local.folder / "iter_0000010")
            for iteration in (20, 30):
                add(local.folder, iteration)
            gone.set()
        if what == "remove" and path.endswith("iter_0000005/__0_0.distcp"):
            assert f"/bucket/run/iter_0000005/{MARKER}" not in fs.store

    fs.hook = remove
    said = mirrored(local, fs, Retention(2, keep_best=False))
    assert whole_in_store(fs) == {20, 30}
    assert any(line.startswith("copied s3://bucket/run/iter_0000010 ") for line in said)
    assert not [path for path in fs.store if "iter_0000005" in path or "iter_0000010" in path]


def test_a_damaged_checkpoint_gets_no_marker(local: LocalCopy) -> None:
    _, fs = flaky_store()
    add(local.folder, 10)
    (local.folder / "iter_0000010/__0_0.distcp").write_bytes(b"another content")
    assert any("is damaged" in line for line in mirrored(local, fs))
    assert whole_in_store(fs) == set()


def test_another_machine_continues_from_the_newest_whole_one(local: LocalCopy, tmp_path: Path) -> None:
    store, fs = flaky_store()
    for iteration in (10, 20, 30):
        add(local.folder, iteration)
    add_tokenizer(local)
    mirrored(local, fs)
    # 30 was cut off by the end of its machine, and a byte of 20 is another one.
    del fs.store[f"/bucket/run/iter_0000030/{MARKER}"]
    fs.store["/bucket/run/iter_0000020/__0_0.distcp"].getbuffer()[0] ^= 1
    other = tmp_path / "other"
    other.mkdir()
    objects = store.objects()
    complete = complete_iterations(store, objects)
    assert set(complete) == {10, 20}
    bring_back(store, objects, complete, other, Report.silent())
    assert set(complete) == {10} and (other / "latest_checkpointed_iteration.txt").read_text() == "10\n"
    for name in ("iter_0000010/__0_0.distcp", "iter_0000010/mixtral_run.json", "tokenizer/tokenizer.json"):
        assert (other / name).read_bytes() == (local.folder / name).read_bytes()
    assert (other / "metrics.jsonl").is_file() and not list(other.glob(".iter*"))
    fs.calls.clear()
    bring_back(store, objects, complete, other, Report.silent())
    assert not fs.calls


def test_a_checkpoint_whose_copy_was_cut_off_needs_space_for_the_rest(
    local: LocalCopy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, fs = flaky_store()
    store = type(store)(fs, store.root, store.url)
    source = add(local.folder, 30)
    (source / "more.distcp").write_bytes(bytes(range(200)))
    mirrored(local, fs)
    size = sum(each.stat().st_size for each in source.iterdir())
    other = tmp_path / "other"
    partial = other / ".iter_0000030.partial"
    partial.mkdir(parents=True)
    # One file is complete, and of another half is there, with a byte that is wrong; a third one is too long.
    shutil.copy(source / "__0_0.distcp", partial)
    (partial / ".metadata.partial").write_bytes(b"x" + (source / ".metadata").read_bytes()[1:5])
    (partial / "more.distcp.partial").write_bytes(bytes(201))
    (partial / "__7_0.distcp").write_bytes(b"of a save that was cut off")
    (other / ".iter_0000020.partial").mkdir()
    left = size - (source / "__0_0.distcp").stat().st_size - 5
    free = [left - 1, left]
    monkeypatch.setattr(transfer, "free_bytes", lambda _: free.pop(0) if free else 0)
    objects = store.objects()
    with pytest.raises(WeightsError, match="no space for the copy"):
        bring_back(store, objects, complete_iterations(store, objects), other, Report.silent())
    fs.calls.clear()
    bring_back(store, objects, complete_iterations(store, objects), other, Report.silent())
    assert {each.name: each.read_bytes() for each in (other / source.name).iterdir()} == {
        each.name: each.read_bytes() for each in source.iterdir()
    }
    assert not list(other.glob(".iter*"))
    assert not [path for what, path in fs.calls if what == "read" and path.endswith("__0_0.distcp")]


def test_the_words_for_each_error_of_a_store() -> None:
    expected = {
        PermissionError("Access Denied"): ("refuses access", 2, 2),
        FileNotFoundError("The specified bucket does not exist"): ("no such bucket", 2, 2),
        OSError(5, "An error occurred (XMinioStorageFull)"): ("no space", 3, 6),
        OSError(22, "InvalidBucketName"): ("does not accept", 2, 2),
        OSError(16, "Slow Down"): ("cannot be reached", 3, 6),
        TimeoutError("read timed out"): ("cannot be reached", 3, 6),
    }
    for error, (words, at_start, in_a_run) in expected.items():
        for code, is_run in ((at_start, False), (in_a_run, True)):
            found = problems.store_error(error, "s3://bucket/run", "It failed.", in_a_run=is_run)
            assert isinstance(found, MixtralRunError) and words in str(found) and found.exit_code == code, error
    with pytest.raises(KeyError):
        problems.store_error(KeyError("a defect"), "s3://bucket/run", "It failed.")

"""Folders of a store that a verb reads, and those that it writes once."""

from __future__ import annotations

import shutil
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixtral_run.errors import ConfigError, HostError, TrainingError, WeightsError
from mixtral_run.terminal.report import Report
from mixtral_run.weights.store import inputs, outputs, problems, transfer
from mixtral_run.weights.store.inputs import bring_here
from mixtral_run.weights.store.marker import FileRecord, Marker, is_safe_name
from mixtral_run.weights.store.outputs import folder_of, folder_output
from mixtral_run.weights.store.run_mirror import Retention
from mixtral_run.weights.store.transfer import receive
from tests.unit.weights.store.flaky_store import FlakyFileSystem, flaky_store, no_fault

URL = "s3://bucket/run"
MARKER = "mixtral_run_complete.json"
CONTENT = {"a.bin": b"a" * 100, "deep/b.bin": bytes(range(256)), "empty": b""}


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FlakyFileSystem:
    """The store behind every URL; a file takes several requests."""
    monkeypatch.setenv("MIXTRAL_RUN_STORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(problems, "PAUSES", (0.0,))
    monkeypatch.setattr(transfer, "BLOCK_BYTES", 64)
    folder, fs = flaky_store()
    for module in (inputs, outputs):
        monkeypatch.setattr(module, "open_store", lambda _: folder)
    return fs


def fill(fs: FlakyFileSystem, marked: bool = True) -> None:
    for name, content in CONTENT.items():
        fs.pipe_file(f"/bucket/run/{name}", content)
    if marked:
        files = {name: FileRecord(len(each), f"{zlib.crc32(each):08x}") for name, each in CONTENT.items()}
        fs.pipe_file(f"/bucket/run/{MARKER}", Marker(files).to_bytes())
    fs.calls.clear()


def contents(folder: Path) -> dict[str, bytes]:
    return {each.relative_to(folder).as_posix(): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def test_an_input_is_copied_once_and_continues_after_a_cut(store: FlakyFileSystem) -> None:
    fill(store)
    reads = []

    def cut(what: str, path: str) -> None:
        if what == "read" and path.endswith("b.bin"):
            reads.append(path)
            if len(reads) == 3:
                raise FileNotFoundError("the bucket was removed")

    store.hook = cut
    with pytest.raises(ConfigError):
        bring_here(URL, Report.silent())
    store.hook = no_fault
    store.calls.clear()
    folder = bring_here(URL, Report.silent())
    assert contents(folder) == CONTENT
    # Two of the four requests for b.bin were answered before the cut, and a.bin was complete.
    data = [path.rpartition("/")[2] for what, path in store.calls if what == "read" and path.endswith(".bin")]
    assert data == ["b.bin", "b.bin"]
    store.calls.clear()
    assert bring_here(URL, Report.silent()) == folder
    assert [path for what, path in store.calls if what == "read"] == [f"/bucket/run/{MARKER}"]


def test_an_input_that_has_changed_in_the_store_is_copied_again(store: FlakyFileSystem) -> None:
    fill(store)
    bring_here(URL, Report.silent())
    store.pipe_file("/bucket/run/a.bin", b"c" * 100)
    files = {"a.bin": FileRecord(100, f"{zlib.crc32(b'c' * 100):08x}")}
    store.pipe_file(f"/bucket/run/{MARKER}", Marker(files).to_bytes())
    assert contents(bring_here(URL, Report.silent())) == {"a.bin": b"c" * 100}


def test_a_damaged_input_is_refused(store: FlakyFileSystem) -> None:
    fill(store)
    store.store["/bucket/run/a.bin"].getbuffer()[7] ^= 1
    with pytest.raises(WeightsError) as error:
        bring_here(URL, Report.silent())
    assert error.value.exit_code == 5 and "a.bin" in str(error.value)


def test_a_part_of_another_object_is_not_continued(store: FlakyFileSystem, tmp_path: Path) -> None:
    fill(store)
    folder, _ = flaky_store()
    (tmp_path / "a.bin.partial").write_bytes(b"x" * 50)
    record = FileRecord(100, f"{zlib.crc32(CONTENT['a.bin']):08x}")
    receive(type(folder)(store, folder.root, URL), "a.bin", tmp_path / "a.bin", record)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT["a.bin"]


def test_a_copy_is_used_when_the_store_is_away(store: FlakyFileSystem, capsys: pytest.CaptureFixture[str]) -> None:
    fill(store, marked=False)
    folder = bring_here(URL, Report())
    assert "only the sizes of its files are compared" in capsys.readouterr().out

    def away(what: str, path: str) -> None:
        raise TimeoutError("no answer")

    store.hook = away
    assert bring_here(URL, Report()) == folder
    assert "the copy of earlier" in capsys.readouterr().out
    (folder / "a.bin").write_bytes(b"")
    with pytest.raises(HostError) as error:
        bring_here(URL, Report())
    assert error.value.exit_code == 3


def test_an_input_that_does_not_fit_is_refused_before_a_byte(
    store: FlakyFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)
    monkeypatch.setattr(transfer, "free_bytes", lambda _: 300)
    with pytest.raises(WeightsError, match="no space for the copy"):
        bring_here(URL, Report.silent())
    assert not [path for what, path in store.calls if what == "read" and path.endswith(".bin")]


def test_an_output_has_its_marker_last_and_is_not_made_twice(store: FlakyFileSystem) -> None:
    settings = {"adapter": "a"}
    with folder_output(URL, False, settings, Report.silent()) as finish:
        assert finish is not None
        make(folder_of(URL))

        def away(what: str, path: str) -> None:
            if "b.bin" in path:
                raise TimeoutError("no answer")

        store.hook = away
        with pytest.raises(TrainingError, match="made, and not copied"):
            finish(lambda: None)
    assert f"/bucket/run/{MARKER}" not in store.store and contents(folder_of(URL)) == CONTENT
    store.hook = no_fault
    store.calls.clear()
    with folder_output(URL, False, settings, Report.silent()) as finish:
        assert finish is None
    written = store.written()
    assert "a.bin" not in written and "deep/b.bin" in written and written[-1] == MARKER
    with pytest.raises(ConfigError, match=r"(?s)new or empty folder, or --overwrite"):
        folder_output(URL, False, settings, Report.silent()).__enter__()
    with folder_output(URL, True, settings, Report.silent()) as finish:
        shutil.rmtree(folder_of(URL))
        make(folder_of(URL), {"only": b"1"})
        assert finish is not None
        finish(lambda: None)
    assert set(store.store) == {"/bucket/run/only", f"/bucket/run/{MARKER}"}


def test_the_other_processes_of_a_job_wait_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would look for a checkpoint to resume from while it is still being copied here."""
    monkeypatch.setattr(outputs, "_WAIT_SECONDS", 0.01)
    waiting = threading.Thread(target=outputs.wait_for_first_process, args=(URL,), daemon=True)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    with outputs.run_output(URL, None, Retention(None, keep_best=False), Report.silent(), list) as finish:
        waiting.join(5)
        assert not waiting.is_alive()
        monkeypatch.setenv("MASTER_PORT", "another job")
        late = threading.Thread(target=outputs.wait_for_first_process, args=(URL,), daemon=True)
        late.start()
        late.join(0.1)
        assert late.is_alive()
        monkeypatch.delenv("MASTER_PORT", raising=False)
        late.join(5)
        assert not late.is_alive()
        finish(lambda: None)


def test_a_host_that_does_not_see_the_first_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hosts whose MIXTRAL_RUN_STORE_CACHE has one path and is not shared; then one that is shared."""
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] > 1000:
            outputs.write_atomically(outputs.local_copy(URL, "outputs").ready, outputs._this_job())

    monkeypatch.setattr(outputs, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    monkeypatch.setattr(outputs, "_WAIT_SECONDS", 1.5)
    monkeypatch.setattr(outputs.socket, "gethostname", lambda: "gpu-02")
    with outputs.begun_here(URL):
        monkeypatch.setenv("MIXTRAL_RUN_STORE_CACHE", str(tmp_path / "here only"))
        with pytest.raises(ConfigError, match=r"(?s)gpu-02.*--env MIXTRAL_RUN_STORE_CACHE=") as refused:
            outputs.wait_for_first_process(URL)
        assert str(tmp_path / "here only") in str(refused.value) and 300 < clock[0] < 310
        monkeypatch.setenv("MIXTRAL_RUN_STORE_CACHE", str(tmp_path / "cache"))
        outputs.wait_for_first_process(URL)
        assert clock[0] > 1000, "a copy of a checkpoint takes longer than a start"
    assert not list((tmp_path / "cache").rglob("begun-*"))


def make(folder: Path, content: dict[str, bytes] = CONTENT) -> None:
    for name, each in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(each)


@pytest.mark.parametrize(
    "damage",
    [b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"version":1,"validation_loss":null,"files":{"../x":{"size":1}}}'],
)
def test_a_marker_that_anybody_wrote_is_checked(damage: bytes) -> None:
    with pytest.raises(WeightsError):
        Marker.from_bytes(damage, URL)
    assert is_safe_name("iter_0000010/__0_0.distcp")
    assert not any(map(is_safe_name, ("", "/etc/x", "../x", "a/../x", "a//b", "a\nb", "a\\b", "./a")))

"""A folder that is written whole or not at all: what stands where after each way in which a writer may end."""

from __future__ import annotations

import errno
import os
import shlex
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_run.errors import WeightsError, from_os_error
from mixtral_run.weights.io import atomic_folder, disk, files
from mixtral_run.weights.io.atomic_folder import Staging, disk_problems, next_output, output_problems, writing_problems
from mixtral_run.weights.io.crc import crc_of
from mixtral_run.weights.io.pread import read_whole

MARKER = "mixtral_run.json"


def tree(folder: Path) -> dict[str, str]:
    return {str(each.relative_to(folder)): each.read_text() for each in folder.rglob("*") if each.is_file()}


def write(staging: Staging, **content: str) -> None:
    for name, text in content.items():
        (staging.folder / name).write_text(text)


def staged(output: Path) -> Staging:
    return Staging(output, MARKER, "mixtral-run test")


def test_a_new_folder_and_one_that_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    with staged(output) as staging:
        assert staging.folder == tmp_path / ".out.unfinished" and not output.exists()
        write(staging, a="1", journal="x")
        (staging.folder / "sub").mkdir()
        write(staging, **{"sub/b": "2", MARKER: "m"})
        staging.publish(spent=("journal",))
    assert tree(tmp_path) == {"out/a": "1", "out/sub/b": "2", f"out/{MARKER}": "m"}
    for exchanges in (True, False):
        if not exchanges:
            monkeypatch.setattr(atomic_folder, "exchange", lambda *_: False)
            (tmp_path / ".out.replaced").mkdir()
            (tmp_path / ".out.replaced" / "rest").write_text("of an earlier run")
        with staged(output) as staging:
            write(staging, c=str(exchanges))
            staging.publish()
        assert tree(tmp_path) == {"out/c": str(exchanges)} and list(tmp_path.iterdir()) == [output]


def test_what_is_not_published_goes_unless_it_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), staged(output) as staging:
        write(staging, a="1")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with staged(output) as staging:
        write(staging, a="1")
        staging.keep = True
    assert {name for name in tree(tmp_path) if "lock" not in name} == {".out.unfinished/a"}
    with staged(output) as staging:
        (staging.folder / "sub").mkdir()
        (staging.folder / "link").symlink_to(tmp_path)
        staging.clear()
        assert [each.name for each in staging.folder.iterdir()] == [".mixtral-run.lock"]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that cannot be replaced, with an earlier result."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "lost+found").mkdir()
    (output / MARKER).write_text("old")
    (output / "a").write_text("old")
    (output / "gone").write_text("old")
    monkeypatch.setattr(atomic_folder, "_stays", lambda path: path.name == "out")
    return output


def test_in_a_mount_point_the_content_moves_up_and_the_marker_is_last(
    mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    remove, rename = atomic_folder._remove, Path.rename
    monkeypatch.setattr(atomic_folder, "_remove", lambda entry: (events.append(f"- {entry.name}"), remove(entry))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append(f"+ {self.name}"), rename(self, to))[1])
    with staged(mounted) as staging:
        assert staging.folder == mounted / ".mixtral-run-unfinished"
        write(staging, a="1", b="2", journal="x", **{MARKER: "new"})
        staging.publish(spent=("journal",))
    assert tree(mounted) == {"a": "1", "b": "2", MARKER: "new"} and (mounted / "lost+found").is_dir()
    moves = [each for each in events if "moving" not in each]
    assert moves[0] == f"- {MARKER}" and moves[-1] == f"+ {MARKER}"
    assert sorted(moves[1:3]) == ["- a", "- gone"] and sorted(moves[3:5]) == ["+ a", "+ b"] and len(moves) == 6


@pytest.mark.parametrize("after", range(7))
def test_a_move_that_is_cut_off_anywhere_is_taken_back(
    mounted: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """The power fails after so many removals and renames; the next writer finds the new content whole."""
    left, remove, rename = [after], atomic_folder._remove, Path.rename

    def count() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise SystemExit

    def counted_rename(self: Path, to: Path) -> Any:
        if "moving" not in self.name:
            count()
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(atomic_folder, "_remove", lambda entry: (count(), remove(entry))[1])
        patch.setattr(Path, "rename", counted_rename)
        # A killed process does not come to its end.
        patch.setattr(Staging, "__exit__", lambda self, *_: self._release() if self._lock is not None else None)
        try:
            with staged(mounted) as staging:
                write(staging, a="1", b="2", **{MARKER: "new"})
                staging.publish()
        except SystemExit:
            pass
    found = tree(mounted)
    complete = found.get(MARKER) == "new"
    assert complete == (after >= 6)
    old = {"a", "gone", MARKER}
    problems = output_problems(mounted, overwrite=False, is_ours=lambda _: True, what="a base")
    # Until the marker is gone the old result is whole; from then on all entries are the move's own.
    assert bool(problems) == (after == 0 or complete), (after, found, problems)
    if complete:
        return
    with staged(mounted) as staging:
        names = {each.name for each in staging.folder.iterdir()} - {".mixtral-run.lock"}
        assert names == {"a", "b", MARKER}
        assert {name: (staging.folder / name).read_text() for name in names} == {"a": "1", "b": "2", MARKER: "new"}
        assert after > 0 or {name for name in tree(mounted) if "/" not in name} >= old
        staging.publish()
    assert tree(mounted) == {"a": "1", "b": "2", MARKER: "new"}


@pytest.mark.parametrize("note", ["{", "[]", '{"new": "a"}', '{"new": ["../a"]}', '{"new": [1]}', "{}"])
def test_a_damaged_note_is_not_acted_upon(mounted: Path, note: str) -> None:
    work = mounted / ".mixtral-run-unfinished"
    work.mkdir()
    (work / ".moving.json").write_text(note)
    with pytest.raises(WeightsError, match="not known which files were moved") as caught, staged(mounted):
        pass
    assert caught.value.where == str(work / ".moving.json")
    assert caught.value.next_command == f"rm -r {work}, then the same command with --overwrite"
    assert atomic_folder._being_moved(mounted) == frozenset()


def problems(output: Path, *, overwrite: bool = False, ours: bool = False) -> list[str]:
    return output_problems(output, overwrite=overwrite, is_ours=lambda _: ours, what="a base")


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert problems(output) == problems(tmp_path / "new" / "deep") == []
    output.mkdir()
    (output / "lost+found").mkdir()
    (output / ".mixtral-run.lock").write_text("")
    assert problems(output) == []
    for name in "dcba":
        (output / name).write_text("")
    flag = f"--output-path {output}: expected an empty or new folder"
    assert problems(output) == [f"{flag}; found a, b, c, …"]
    (output / "d").unlink()
    assert problems(output, overwrite=True) == [f"{flag} or a base; found a, b, c; --overwrite replaces nothing else"]
    assert problems(output, ours=True) == [f"{flag}; found a base (--overwrite replaces it)"]
    assert problems(output, ours=True, overwrite=True) == []
    assert problems(output / "a" / "b") == [f"--output-path {output / 'a' / 'b'}: {output / 'a'} is a file"]
    assert next_output(["other"]) is None
    assert next_output(problems(output)) == "the same command with another --output-path"
    assert (
        next_output(problems(output, ours=True)) == "the same command with another --output-path, or with --overwrite"
    )


@pytest.mark.parametrize(("lacks", "found"), [(os.W_OK, "written to"), (os.X_OK, "written to"), (os.R_OK, "read")])
def test_folders_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: int, found: str) -> None:
    real = os.access
    monkeypatch.setattr(atomic_folder.os, "access", lambda path, mode: not mode & lacks and real(path, mode))
    assert writing_problems(tmp_path, "--save") == [f"--save: {tmp_path} cannot be {found} by this user"]
    # Below a folder that cannot be read one can be created.
    assert (writing_problems(tmp_path / "new", "--save") == []) == (lacks == os.R_OK)


def test_a_disk_that_is_too_small_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 2**29))
    output = tmp_path / "out"
    assert disk_problems(output, 3 * 2**29) == []
    assert disk_problems(output, 3 * 2**29 + 1) == [
        f"no space on the disk of {output}: expected 1.50 GiB free (1,610,612,737 bytes); "
        "found 1.50 GiB (1,610,612,736 bytes)"
    ]
    next_step = next_output(disk_problems(output, 3 * 2**29 + 1))
    assert next_step == "free space there, or the same command with another --output-path"
    # What an unfinished run left is used again or removed.
    work = tmp_path / ".out.unfinished"
    work.mkdir()
    (work / "a").write_bytes(b"x" * 8192)
    blocks = (work / "a").stat().st_blocks * 512
    assert disk_problems(output, 3 * 2**29 + blocks) == [] and disk_problems(output, 3 * 2**29 + blocks + 1)
    assert atomic_folder.on_one_disk(output / "deep", tmp_path)


def test_small_files_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_atomically(path, "ä\n")
    assert path.read_bytes() == b"\xc3\xa4\n" and list(tmp_path.iterdir()) == [path]
    events: list[str] = []
    rename, fsync = Path.rename, os.fsync
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: (events.append("sync"), fsync(descriptor))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append(self.name), rename(self, to))[1])
    files.write_atomically(path, "b")
    assert events == ["sync", ".file.partial"]
    (tmp_path / "sub").mkdir()
    events.clear()
    files.sync_folder_and_files(tmp_path)
    assert events == ["sync", "sync"]
    assert files.how_to_restore(path) is None and files.how_to_restore(tmp_path / "out") is None
    (tmp_path / ".out.replaced").mkdir()
    assert (files.how_to_restore(tmp_path / "out") or "").startswith(
        f"mv {tmp_path / '.out.replaced'} {tmp_path / 'out'}"
    )
    (tmp_path / "out").mkdir()
    assert files.how_to_restore(tmp_path / "out") is None


def test_a_range_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    content = bytes(range(256)) * 9000
    path.write_bytes(content)
    assert crc_of(path) == zlib.crc32(content)
    descriptor = os.open(path, os.O_RDONLY)
    block = bytearray(10)
    read_whole(descriptor, memoryview(block), 250, path)
    assert bytes(block) == content[250:260]
    # The system may give less than was asked for.
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:3]], at))
    read_whole(descriptor, memoryview(block), 1, path)
    assert bytes(block) == content[1:11]
    with pytest.raises(WeightsError, match="became shorter") as caught:
        read_whole(descriptor, memoryview(block), len(content) - 9, path)
    assert caught.value.where == str(path)

    def broken(_: int, __: Any, at: int) -> int:
        if at > 1003:
            raise OSError(errno.EIO, "Input/output error")
        return 3

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(WeightsError) as failed:
        read_whole(descriptor, memoryview(block), 1001, path)
    assert (failed.value.where, failed.value.found) == (f"{path}, byte 1,004", "Input/output error")
    os.close(descriptor)


def test_memory_and_disks_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2000 kB\nMemFree: 1 kB\n")
    monkeypatch.setattr(disk, "_MEMORY", tmp_path / "meminfo")
    for in_groups, expected in ((None, 2048000), (1000000, 1000000), (3000000, 2048000), (0, 1)):
        monkeypatch.setattr(disk, "free_in_cgroups", lambda free=in_groups: free)
        assert disk.available_bytes() == expected
        assert disk.fits_in_memory(expected - 1) and not disk.fits_in_memory(expected)
    monkeypatch.setattr(disk, "free_in_cgroups", lambda: None)
    monkeypatch.setattr(disk, "_MEMORY", tmp_path / "none")
    assert disk.available_bytes() == 0
    device = tmp_path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    monkeypatch.setattr(disk, "_MOUNTS", tmp_path / "mounts")
    assert not disk.is_in_memory(tmp_path)
    for line, expected in (
        (f"36 35 {number} / /x rw shared:1 - tmpfs tmpfs rw", True),
        (f"36 35 {number} / /x rw - ext4 tmpfs rw", False),
        ("36 35 0:0 / /x rw - tmpfs tmpfs rw", False),
    ):
        (tmp_path / "mounts").write_text(f"1 1 9:9 / / rw - ext4 /dev/x rw\n{line}\n")
        assert disk.is_in_memory(tmp_path) is expected


def test_the_command_for_a_path_can_be_pasted(tmp_path: Path) -> None:
    error = from_os_error(PermissionError(errno.EACCES, "no", str(tmp_path / "it's a")))
    assert error is not None and error.next_command is not None
    assert shlex.split(error.next_command) == ["ls", "-ld", str(tmp_path / "it's a")]

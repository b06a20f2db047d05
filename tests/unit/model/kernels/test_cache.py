"""Kernels that the image holds are copied to the cache of a job, and only those that it lacks."""

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral_run.model.kernels.cache import FOLDER_VARIABLE, cache_folder, copy_compiled, copy_from_image


def entry(folder: Path, name: str, content: bytes = b"code") -> Path:
    """Write an entry as Triton does: its group lists the files by their absolute paths."""
    made = folder / name
    made.mkdir(parents=True)
    (made / "kernel.cubin").write_bytes(content)
    paths = {"kernel.cubin": str(made / "kernel.cubin")}
    (made / "__grp__kernel.json").write_text(json.dumps({"child_paths": paths}))
    return made


def test_entries_that_are_missing_are_copied(tmp_path: Path) -> None:
    image, cache = tmp_path / "image", tmp_path / "deep" / "cache"
    entry(image, "AAA", b"of the image")
    entry(image, "BBB", b"of the image")
    (image / "product-1.cubin").write_bytes(b"machine code")
    kept = entry(cache, "BBB", b"of an earlier job")
    assert copy_compiled(image, cache) == 2
    assert (kept / "kernel.cubin").read_bytes() == b"of an earlier job"
    assert (cache / "product-1.cubin").read_bytes() == b"machine code"
    # Without the image, on the host, the entry is whole.
    group = json.loads((cache / "AAA" / "__grp__kernel.json").read_text())
    assert group["child_paths"] == {"kernel.cubin": str(cache / "AAA" / "kernel.cubin")}
    assert {each.name for each in cache.iterdir()} == {"AAA", "BBB", "product-1.cubin"}
    assert copy_compiled(image, cache) == 0


def test_an_image_without_kernels_and_a_full_disk_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert copy_compiled(tmp_path / "missing", tmp_path / "cache") == 0
    entry(tmp_path / "image", "AAA")
    (tmp_path / "file").write_text("")
    assert copy_compiled(tmp_path / "image", tmp_path / "file" / "cache") == 0
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    assert copy_from_image() == 0
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "image"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert copy_from_image() == 1
    assert (cache_folder() / "AAA" / "kernel.cubin").read_bytes() == b"code"


@pytest.mark.parametrize("damage", [b"\xff\xfe", b'{"child_paths": {'])
def test_a_damaged_entry_is_left_out(tmp_path: Path, damage: bytes) -> None:
    image, cache = tmp_path / "image", tmp_path / "cache"
    (entry(image, "AAA") / "__grp__kernel.json").write_bytes(damage)
    entry(image, "BBB")
    assert copy_compiled(image, cache) == 1
    assert [each.name for each in cache.iterdir()] == ["BBB"]


def test_what_cannot_be_read_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry(tmp_path / "image", "AAA")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "image"))

    def refuse(path: Path, *_: object, **__: object) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("iterdir", "exists"):
        with monkeypatch.context() as patch:
            patch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
            patch.setattr(Path, name, refuse)
            assert copy_from_image() == 0
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(RuntimeError):
        cache_folder()
    assert copy_from_image() == 0


INTERRUPTED = """
import atexit, shutil, sys, threading
from pathlib import Path
from mixtral_run.model.kernels.cache import copy_compiled
image, cache, ends = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "ends"
copied, go = threading.Event(), threading.Event()
real = shutil.copytree
def copytree(*paths):
    real(*paths)
    copied.set()
    go.wait()
shutil.copytree = copytree
thread = threading.Thread(target=copy_compiled, args=(image, cache), daemon=True)
# Runs after what others do at the end of the process.
atexit.register(lambda: None if ends else (go.set(), thread.join()))
thread.start()
copied.wait()
"""


@pytest.mark.parametrize("when", ["ends", "goes on"])
def test_a_copy_at_the_end_of_the_process_is_whole_or_has_no_name(tmp_path: Path, when: str) -> None:
    image, cache = tmp_path / "image", tmp_path / "cache"
    made = entry(image, "AAA")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-c", INTERRUPTED, str(image), str(cache), when]
    done = subprocess.run(argv, timeout=60, check=False, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    (left,) = cache.iterdir()
    if when == "ends":
        assert left.name.startswith("tmp")
    else:
        assert left.name == made.name and {each.name for each in left.iterdir()} == {
            each.name for each in made.iterdir()
        }

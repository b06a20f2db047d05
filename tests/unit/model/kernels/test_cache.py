"""Kernels that the image holds are copied to the cache of a job, and only those that it lacks."""

import json
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

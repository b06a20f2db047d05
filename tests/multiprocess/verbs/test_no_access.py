"""Files and folders that this user may not read or write: reported in words, with the exit code, before any work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixtral_run.weights.manifest.checkpoint_folder import LATEST

# Root reads everything, but for what these two are taken from.
AS_USER = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
LAYOUT = (
    "--nproc-per-node", "1", "--tensor-model-parallel-size", "1", "--expert-model-parallel-size", "1", "--mock-data",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, small_hf_model: Path, small_checkpoint: Path) -> Iterator[Path]:
    """A folder with models, and `closed` and `read-only` beside them."""
    for name, mode in (("closed", 0o000), ("read-only", 0o555)):
        (tmp_path / name).mkdir(mode=mode)
        (tmp_path / name).chmod(mode)
    (tmp_path / "hf").symlink_to(small_hf_model)
    (tmp_path / "base").symlink_to(small_checkpoint)
    for name in ("tokenizer", "config"):
        shutil.copytree(small_hf_model, tmp_path / f"hf-{name}")
        (tmp_path / f"hf-{name}" / f"{name}.json").chmod(0)
    yield tmp_path
    (tmp_path / "closed").chmod(0o755)


@pytest.mark.parametrize(
    ("words", "exit_code", "reported"),
    [
        (("convert", "--hf-model-path", "closed", "--output-path", "o"), 5, ["closed/config.json", "ls -ld closed"]),
        (("convert", "--hf-model-path", "closed/x", "--output-path", "o"), 5, ["where:    closed/x", "ls -ld closed"]),
        (("convert", "--hf-model-path", "hf-config", "--output-path", "o"), 5, ["hf-config/config.json"]),
        (("convert", "--hf-model-path", "hf-tokenizer", "--output-path", "read-only/o"), 2,
         ["hf-tokenizer/tokenizer.json: cannot be read", "--output-path read-only/o:", "read-only cannot be written"]),
        (("convert", "--hf-model-path", "hf", "--output-path", "closed/o"), 2, ["--output-path closed/o:", "closed c"]),
        (("convert", "--hf-model-path", "hf", "--output-path", "closed"), 2, ["--output-path closed: "]),
        (("convert", "--from-megatron", "closed", "--output-path", "o"), 5, ["where:    closed", "ls -ld closed"]),
        (("plan", "--load", "closed"), 5, ["where:    closed", "ls -ld closed"]),
        (("plan", "--config", "hf-config/config.json", "--gpus", "x"), 2, ["The config file cannot be read."]),
        (("finetune", "--load", "closed", "--save", "read-only/a", *LAYOUT), 5,
         ["where:    closed", "--save read-only/a:", "read-only cannot be written"]),
        (("finetune", "--load", "base", "--save", "closed/a", "--keep-last", "1", *LAYOUT), 2, ["--save closed/a: "]),
    ],
)  # fmt: skip
def test_it_is_reported(folder: Path, words: tuple[str, ...], exit_code: int, reported: list[str]) -> None:
    before = sorted(folder.iterdir())
    argv = [*AS_USER, sys.executable, "-m", "mixtral_run", *words]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == exit_code, done.stderr
    for piece in reported:
        assert piece in done.stderr
    assert "Traceback" not in done.stderr
    assert "Copy" not in done.stdout
    assert sorted(folder.iterdir()) == before
    assert (folder / "base" / LATEST).exists()

"""Inputs that convert refuses: the message, and nothing unfinished is left."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.config.verbs.weights import ConvertConfig, VerifyConfig
from mixtral_run.errors import ConfigError, MixtralRunError, WeightsError
from mixtral_run.terminal.report import Report
from mixtral_run.weights.convert import to_megatron as convert_module
from mixtral_run.weights.convert.to_megatron import convert
from mixtral_run.weights.io import atomic_folder
from mixtral_run.weights.io.mmap_writer import MappedWriter
from mixtral_run.weights.manifest.manifest import read_values
from mixtral_run.weights.verify.verify import verify
from tests.multiprocess.conftest import environment_of
from tests.multiprocess.weights.test_convert import convert_quietly, run_cli
from tests.support.processes import commands
from tests.support.tiny import write_tiny


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "hf")
    return tmp_path / "hf"


def refused(source: Path, output: Path, tp: int = 2, ep: int = 4, **more: bool) -> MixtralRunError:
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(MixtralRunError) as caught:
        convert_quietly(source, output, tp, ep, **more)
    assert sorted(output.parent.rglob("*")) == before
    return caught.value


def test_all_problems_of_weights_layout_and_folder_at_once_through_the_command_line(tmp_path: Path, tiny: Path) -> None:
    (tiny / "model-00001-of-00003.safetensors").unlink()
    file = tiny / "model-00003-of-00003.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 1)
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    flags = ("--tensor-model-parallel-size", "3", "--expert-model-parallel-size", "5")
    done = run_cli("convert", "--hf-model-path", tiny, "--output-path", output, *flags)
    assert done.returncode == WeightsError.exit_code
    assert "model-00001-of-00003.safetensors: missing" in done.stderr
    assert f"truncated: expected {size:,} bytes; found {size - 1:,}" in done.stderr
    assert "--tensor-model-parallel-size 3: does not divide the model's 8 attention heads" in done.stderr
    assert "--expert-model-parallel-size 5: does not divide the model's 8 experts" in done.stderr
    assert "notes.txt" in done.stderr
    assert "Traceback" not in done.stderr
    assert [entry.name for entry in output.iterdir()] == ["notes.txt"]


def test_layout_that_does_not_fit(tmp_path: Path, tiny: Path) -> None:
    error = refused(tiny, tmp_path / "out", 3, 5)
    assert isinstance(error, ConfigError)
    assert len(error.problems) == 3  # heads, groups, experts; a vocabulary is padded
    config = ConvertConfig(hf_model_path=str(tiny), output_path=tmp_path / "out", expert_tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="expert-tensor-parallel-size"):
        convert(config, Report.silent())


def test_another_architecture(tmp_path: Path, tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"model_type": "llama", "tie_word_embeddings": True}))
    error = refused(tiny, tmp_path / "out")
    assert isinstance(error, WeightsError)
    assert "model_type: expected 'mixtral'; found 'llama'" in str(error)
    assert "tie_word_embeddings" in str(error)


def test_what_is_no_directory_of_a_model(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    # Relative, the file has the form of a name on the hub.
    for source, words in (
        ("hf/config.json", ("is not a directory", "found:    a file")),
        ("empty", ("has no config.json", "found:    an empty directory", "next:")),
        ("nowhere", ("does not exist", "found:    nothing of that name", "next:")),
    ):
        error = refused(Path(source), Path("out"), 2, 3)
        assert isinstance(error, WeightsError)
        assert all(each in str(error) for each in words), error


def test_output_folders_that_are_not_ours_to_replace(tmp_path: Path, tiny: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    assert "found thesis.tex" in str(refused(tiny, output))
    assert "--overwrite replaces nothing else" in str(refused(tiny, output, overwrite=True))
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in str(refused(tiny, file))
    assert "is a file" in str(refused(tiny, file / "below"))


def test_overwrite_replaces_an_earlier_checkpoint_only_when_asked(tmp_path: Path, tiny: Path) -> None:
    output = tmp_path / "out"
    first = convert_quietly(tiny, output, 2, 4)
    assert "--overwrite replaces it" in str(refused(tiny, output))
    write_tiny(tmp_path / "other", seed=5)
    second = convert_quietly(tmp_path / "other", output, 1, 2, overwrite=True)
    assert second != first
    assert read_values(output)["fingerprint"] == second
    assert len(list(output.glob("iter_0000001/*.distcp"))) == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hf", "other", "out"]


def test_an_empty_folder_is_used(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "out").mkdir()
    convert_quietly(tiny, tmp_path / "out", 2, 4)
    assert read_values(tmp_path / "out")["kind"] == "base"


def test_no_space_is_reported_before_work(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_folder, "free_bytes", lambda _: 1_000_000)
    error = refused(tiny, tmp_path / "out")
    assert isinstance(error, ConfigError)
    assert "no space on the disk" in str(error)
    assert "1,000,000 bytes" in str(error)


SLOW = """
import itertools, time, mixtral_run.weights.convert.copy as copy
read, numbers = copy._Worker._read, itertools.count()
copy.FLUSH_SECONDS = 0.2
# Some go through, then each takes long: it cannot be done before it is cut off, however slow this machine is just now.
copy._Worker._read = lambda *arguments: (time.sleep(0.05 if next(numbers) < 32 else 5), read(*arguments))
from mixtral_run.cli.main import main
main()
"""


def content(checkpoint: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(checkpoint)): path for path in checkpoint.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items()}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_cut_off_it_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, tiny: Path, how: int) -> None:
    output, unfinished = tmp_path / "out", tmp_path / ".out.unfinished"
    words = ["convert", "--hf-model-path", str(tiny), "--output-path", str(output)]
    process = commands.start(["-c", SLOW, *words], environment_of(), stderr=subprocess.PIPE)
    journal = unfinished / "journal.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.is_file() and journal.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(ConfigError, match=f"found mixtral-run convert, process {process.pid} on"):
        convert_quietly(tiny, output, 2, 4)
    process.send_signal(how)
    _, reported = process.communicate(timeout=60)
    assert not output.exists()
    if how == signal.SIGINT:
        assert (process.returncode, reported.strip()) == (130, "Interrupted.")
    with pytest.raises(WeightsError):
        verify(VerifyConfig(load=unfinished), Report.silent())
    with journal.open("a") as stream:
        stream.write('{"job": 64, "sour')  # a line that was being written
    reported_again = io.StringIO()
    convert(ConvertConfig(hf_model_path=str(tiny), output_path=output), Report(reported_again))
    assert "continuing after" in reported_again.getvalue()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hf", "out"]
    convert_quietly(tiny, tmp_path / "whole", 2, 4)
    assert content(output) == content(tmp_path / "whole")


def test_the_bytes_do_not_depend_on_the_workers(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def converted(name: str, *flags: str) -> dict[str, bytes]:
        done = run_cli("convert", "--hf-model-path", tiny, "--output-path", tmp_path / name, *flags)
        assert done.returncode == 0, done.stderr
        return content(tmp_path / name)

    one = converted("one", "--workers", "1")
    assert converted("seven", "--workers", "7") == one
    # Also while numbers are being tried, and with the cache dropped behind.
    monkeypatch.setattr("mixtral_run.weights.io.pace.WINDOW_SECONDS", 0.0)
    monkeypatch.setattr("mixtral_run.weights.convert.copy._STEP_SECONDS", 0.0)
    monkeypatch.setattr("mixtral_run.weights.convert.copy.BLOCK_BYTES", 1000)
    monkeypatch.setattr("mixtral_run.weights.convert.copy.fits_in_memory", lambda _: False)
    convert_quietly(tiny, tmp_path / "measured", 2, 4)
    assert content(tmp_path / "measured") == one
    refusal = run_cli("convert", "--hf-model-path", tiny, "--output-path", tmp_path / "none", "--workers", "0")
    assert refusal.returncode == ConfigError.exit_code


class TakesRoom(Report):
    """Another writer comes when the room has been checked and the copy begins."""

    def __init__(self, ballast: Path, left: int) -> None:
        super().__init__(io.StringIO())
        self._ballast, self._left = ballast, left

    def step(self, number: int, total: int, text: str) -> None:
        super().step(number, total, text)
        if number == 3:
            free = shutil.disk_usage(self._ballast.parent).free
            self._ballast.write_bytes(bytes(free - self._left))


@pytest.mark.parametrize("left", [400_000, 700_000])
def test_a_disk_that_fills_up_during_the_copy(tmp_path: Path, tiny: Path, mounted: Path, left: int) -> None:
    output = mounted / "out"
    config = ConvertConfig(hf_model_path=str(tiny), output_path=output, workers=1)
    with pytest.raises(WeightsError) as caught:
        convert(config, TakesRoom(mounted / "ballast", left))
    for words in ("cannot be written", "No space left on device", "it continues where this one stopped"):
        assert words in str(caught.value)
    assert not output.exists()
    (mounted / "ballast").unlink()
    reported = io.StringIO()
    convert(config, Report(reported))
    assert "continuing after" in reported.getvalue()
    convert_quietly(tiny, tmp_path / "whole", 2, 4)
    assert content(output) == content(tmp_path / "whole")
    assert sorted(entry.name for entry in mounted.iterdir()) == ["out"]


def test_a_disk_that_fills_up_at_the_very_end(
    tmp_path: Path, tiny: Path, mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is copied; the small files find no room."""
    write = convert_module.write_proof

    def full(*arguments: Any) -> None:
        (mounted / "ballast").write_bytes(bytes(shutil.disk_usage(mounted).free - 1))
        write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("mixtral_run.weights.convert.to_megatron.write_proof", full)
        with pytest.raises(WeightsError, match="No space left on device"):
            convert_quietly(tiny, mounted / "out", 2, 4)
    (mounted / "ballast").unlink()
    monkeypatch.setattr("mixtral_run.weights.convert.copy._Worker.copy", lambda *_: pytest.fail("a job is done again"))
    convert_quietly(tiny, mounted / "out", 2, 4)
    verify(VerifyConfig(load=mounted / "out", against=tiny, proof=True), Report.silent()).check()


def test_output_that_is_a_mount_point(tmp_path: Path, tiny: Path, mounted: Path) -> None:
    first = convert_quietly(tiny, mounted, 2, 4)
    assert read_values(mounted)["fingerprint"] == first
    write_tiny(tmp_path / "other", seed=5)
    convert_quietly(tmp_path / "other", mounted, 2, 4, overwrite=True)
    assert read_values(mounted)["fingerprint"] != first
    assert sorted(entry.name for entry in mounted.iterdir()) == [
        "iter_0000001",
        "latest_checkpointed_iteration.txt",
        "mixtral_run.json",
        "proof.json",
        "tokenizer",
    ]
    (mounted / "ballast").write_bytes(b"x" * 15 * 2**20)
    assert "no space on the disk" in str(refused(tiny, mounted / "second"))


def test_other_ranks_of_torchrun_return_at_once(tmp_path: Path, tiny: Path) -> None:
    flags = ("--hf-model-path", tiny, "--output-path", tmp_path / "out")
    done = run_cli("convert", *flags, RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "out").exists()


def test_memory_that_fills_up_is_an_error_and_no_bus_error(mounted: Path) -> None:
    """A write into a mapped file without a free page kills the process, unless the space was reserved before."""
    length = 200 * 2**20
    with (mounted / "file").open("wb+") as stream:
        os.ftruncate(stream.fileno(), length)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            MappedWriter().write(stream.fileno(), (0, length), 0, bytes(length))

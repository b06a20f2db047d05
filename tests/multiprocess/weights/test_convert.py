"""`mixtral-run convert`, called as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_run.config.verbs.weights import ConvertConfig
from mixtral_run.terminal.report import Report
from mixtral_run.weights.convert.to_megatron import convert
from mixtral_run.weights.io.mmap_writer import MappedWriter
from mixtral_run.weights.io.pace import Pace
from tests.multiprocess.conftest import environment_of, fresh_mixtral_run, mixtral_run, torchrun
from tests.support.tiny import write_tiny


def run_cli(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return mixtral_run(*map(str, words), **environment)


def convert_quietly(source: Path, output: Path, tp: int, ep: int, **more: Any) -> str:
    config = ConvertConfig(
        hf_model_path=str(source),
        output_path=output,
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        **more,
    )
    return convert(config, Report.silent()).fingerprint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hf") / "tiny"
    write_tiny(directory)
    return directory


def load_in_megatron(hf: Path, checkpoint: Path, tp: int, ep: int) -> None:
    worker = Path(__file__).with_name("megatron_load_worker.py")
    printed = torchrun(max(tp, ep), worker, str(hf), str(checkpoint / "iter_0000001"), str(tp), str(ep))
    assert printed.count("parameters equal") == max(tp, ep)


@pytest.mark.parametrize(
    ("written", "read", "dtype"),
    [
        ((2, 4), (1, 1), torch.float32),
        ((2, 4), (2, 2), torch.bfloat16),
        ((1, 8), (2, 4), torch.float32),
    ],
)
def test_megatron_loads_it_strictly_in_another_layout(
    tmp_path: Path, written: tuple[int, int], read: tuple[int, int], dtype: torch.dtype
) -> None:
    write_tiny(tmp_path / "hf", dtype=dtype)
    convert_quietly(tmp_path / "hf", tmp_path / "out", *written)
    load_in_megatron(tmp_path / "hf", tmp_path / "out", *read)


@pytest.mark.parametrize("experts", ["sequential", "grouped"])
def test_its_keys_are_those_of_transformer_engines_layers(tmp_path: Path, experts: str) -> None:
    """megatron-core's own wrappers of them, over stand-ins that hold the parameters: none missing, none left over."""
    write_tiny(tmp_path / "hf")
    convert_quietly(tmp_path / "hf", tmp_path / "out", 2, 4)
    worker = Path(__file__).with_name("te_load_worker.py")
    argv = [str(worker), str(tmp_path / "hf"), str(tmp_path / "out" / "iter_0000001"), experts]
    # A new interpreter: the stand-ins have to be there before Megatron is imported.
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=300, env=environment_of())
    assert done.returncode == 0, done.stderr[-4000:]
    assert "45 parameters equal" in done.stdout


def test_what_it_prints_and_writes(tmp_path: Path, tiny: Path) -> None:
    output = tmp_path / "new" / "checkpoint"
    done = fresh_mixtral_run("convert", "--hf_model_path", str(tiny), "--output_path", str(output))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line[:5] for line in lines if line.startswith("[")] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert "✓ Conversion complete" in lines
    assert "MB/s, peak RSS" in done.stdout
    assert sorted(entry.name for entry in output.iterdir()) == [
        "iter_0000001",
        "latest_checkpointed_iteration.txt",
        "mixtral_run.json",
        "proof.json",
        "tokenizer",
    ]
    assert sorted(entry.name for entry in (output / "iter_0000001").iterdir()) == [
        ".metadata",
        *(f"__{rank}_0.distcp" for rank in range(4)),
        "common.pt",
        "metadata.json",
        "run_config.yaml",
    ]
    assert [entry.name for entry in output.parent.iterdir()] == ["checkpoint"]
    record = json.loads((output / "mixtral_run.json").read_text())
    assert (record["kind"], record["dtype"], record["tensor_model_parallel_size"]) == ("base", "float32", 2)
    assert (output / "tokenizer" / "tokenizer.json").is_file()


def test_fingerprint_is_of_the_content(tmp_path: Path, tiny: Path) -> None:
    first = convert_quietly(tiny, tmp_path / "a", 2, 4)
    write_tiny(tmp_path / "resharded", num_shards=7)
    write_tiny(tmp_path / "fused", fused=True)
    write_tiny(tmp_path / "other", seed=1)
    assert convert_quietly(tmp_path / "resharded", tmp_path / "b", 1, 8) == first
    assert convert_quietly(tmp_path / "fused", tmp_path / "c", 4, 2) == first
    assert convert_quietly(tmp_path / "other", tmp_path / "d", 2, 4).split("-")[0] != first.split("-")[0]
    for file in ("__0_0.distcp", "__3_0.distcp"):
        a, again = (tmp_path / name / "iter_0000001" / file for name in ("a", "e"))
        if not again.exists():
            convert_quietly(tiny, tmp_path / "e", 2, 4)
        assert a.read_bytes() == again.read_bytes()


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 4)])
def test_the_same_bytes_through_mapped_memory(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, tp: int, ep: int
) -> None:
    convert_quietly(tiny, tmp_path / "in turns", tp, ep)
    mapped_bytes = 0

    class Mapping(Pace):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            self.now = self.chosen = self.now._replace(mapped=True)
            self.settled = True

    def count(*arguments: Any) -> bool:
        nonlocal mapped_bytes
        done = write(*arguments)
        mapped_bytes += done * len(arguments[-1])
        return done

    write = MappedWriter.write
    monkeypatch.setattr(MappedWriter, "write", count)
    monkeypatch.setattr("mixtral_run.weights.convert.copy.Pace", Mapping)
    # Smaller than most tensors: they take several windows.
    monkeypatch.setattr("mixtral_run.weights.io.mmap_writer.WINDOW_BYTES", 4096)
    convert_quietly(tiny, tmp_path / "mapped", tp, ep, workers=1)
    assert mapped_bytes == sum(file.stat().st_size for file in tiny.glob("*.safetensors")) - headers(tiny)
    for file in sorted((tmp_path / "in turns/iter_0000001").glob("*.distcp")):
        assert (tmp_path / "mapped/iter_0000001" / file.name).read_bytes() == file.read_bytes()


def headers(folder: Path) -> int:
    """Bytes of the safetensors files that are not tensors'."""
    return sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in folder.glob("*.safetensors"))

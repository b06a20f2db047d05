"""The model that the benches make: what it says it is, the same whatever the workers; and the bench of conversion."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import benchmarks.adapter_save
import benchmarks.convert
import benchmarks.quantized_start
from benchmarks.convert import Floor
from benchmarks.make_mixtral import make, scaled
from benchmarks.support import process_memory
from tests.multiprocess.verbs.test_export import hf_tensors_of
from tests.multiprocess.weights.test_convert import convert_quietly
from tests.support.processes import commands, warm
from tests.support.processes.commands import forked_python

ROOT = Path(__file__).parents[3]
OutputOf = Callable[..., dict[str, Any]]


@pytest.fixture
def output_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> OutputOf:
    """Return a function that runs a bench in this process and returns the JSON object at the end of its output.

    What it measures is forked, and so are the processes of torchrun, which is a new interpreter itself.
    """
    program = forked_python(tmp_path_factory.mktemp("bin"))

    def started(argv: list[str], **options: Any) -> subprocess.Popen[str]:
        if "direct" in argv or "torch.distributed.run" in argv:
            return subprocess.Popen(argv, env={**warm.ENVIRONMENT, "PYTHON_EXEC": program}, cwd=ROOT, **options)
        assert argv[0] == sys.executable and options.pop("text")
        return commands.start(argv[1:], warm.ENVIRONMENT, cwd=ROOT, **options)

    def done(argv: list[str], *, check: bool) -> None:
        assert check and warm.run(argv[1:], warm.ENVIRONMENT).returncode == 0

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(process_memory, "subprocess", SimpleNamespace(Popen=started, PIPE=subprocess.PIPE))
    monkeypatch.setattr(benchmarks.convert, "subprocess", SimpleNamespace(run=done))

    def call(bench: ModuleType, *words: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [bench.__name__, *map(str, words)])
        bench.main()
        reported: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return reported

    return call


def test_it_is_a_mixtral_of_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.make_mixtral.PART_BYTES", 100_000)
    monkeypatch.setattr("benchmarks.make_mixtral.POOL_NUMBERS", 2**19 + 1)
    architecture = scaled(1, 512, 256, 1024)
    for name, seed, workers in (("one", 1, 1), ("five", 1, 5), ("other", 2, 5)):
        num_bytes = make(tmp_path / name, architecture, num_shards=3, seed=seed, workers=workers)
        assert num_bytes == 2 * architecture.num_parameters
    one, five, other = (hf_tensors_of(tmp_path / name) for name in ("one", "five", "other"))
    assert all(torch.equal(one[name], five[name]) for name in one)
    matrices = {name: tensor.float() for name, tensor in one.items() if tensor.dim() == 2}
    assert all((tensor == 1).all() for name, tensor in one.items() if tensor.dim() == 1)
    for name, tensor in matrices.items():
        assert tensor.std() == pytest.approx(0.02, rel=0.1)
        assert abs(float(tensor.mean())) < 0.002
        assert not torch.equal(one[name], other[name])
    experts = [tensor for name, tensor in matrices.items() if name.endswith(".w1.weight")]
    assert all(not torch.equal(experts[0], each) for each in experts[1:])
    fingerprints = {
        convert_quietly(tmp_path / name, tmp_path / f"{name}-out", 2, 4) for name in ("one", "five", "other")
    }
    assert len(fingerprints) == 2
    with pytest.raises(SystemExit, match="something already"):
        make(tmp_path / "one", architecture, num_shards=3, seed=1, workers=1)


def test_the_bench_of_conversion_measures_every_way_it_is_asked_for(output_of: OutputOf, tmp_path: Path) -> None:
    sizes = ("--layers", "1", "--hidden-size", "512", "--ffn-hidden-size", "256", "--vocab-size", "1024")
    ways = ("copy", "stream", "read", "direct")
    words = (*sizes, "--rounds", "1", "--places", "disk", "--ways", *ways, "--folder", tmp_path)
    reported = output_of(benchmarks.convert, *words)["disk"]
    assert set(reported) == set(ways)
    assert all(each["gb_s"] > 0 and each["peak_anonymous_mb"] > 0 for each in reported.values())
    assert reported["direct"]["first_iteration_seconds"] > 0
    assert not any(tmp_path.iterdir())


def test_a_conversion_below_its_share_of_a_copys_speed_is_named() -> None:
    floor = Floor.parse("stream/copy=0.8")
    places = {
        "disk": {"stream": {"gb_s": 0.79}, "copy": {"gb_s": 1.0}},
        "ram": {"stream": {"gb_s": 1.6}, "copy": {"gb_s": 2.0}},
    }
    assert floor.missed(places) == ["disk: stream has 0.79 of the speed of copy; expected at least 0.8"]
    for wrong in ("stream/copy", "stream=0.8", "stream/rsync=0.8", "stream/copy=-1"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected WAY/WAY=SHARE"):
            Floor.parse(wrong)


def test_the_bench_of_starts_reads_less_from_the_quantized_cache(output_of: OutputOf, tmp_path: Path) -> None:
    sizes = ("--layers", "2", "--hidden-size", "512", "--ffn-hidden-size", "1024", "--vocab-size", "1024")
    only = ("--bases", "hf", "--precisions", "nf4")
    reported = output_of(benchmarks.quantized_start, *sizes, *only, "--rounds", "1", "--folder", tmp_path)
    assert len(reported) == 3
    quantized, kept, taken = (reported[f"hf nf4 {way}"] for way in ("quantised", "kept", "taken"))
    assert quantized["gb_read"] > 2.5 * taken["gb_read"] > 0
    assert kept["gb_written"] > quantized["gb_written"]
    assert not any(tmp_path.iterdir())


def test_the_bench_of_saving_measures_both_ways(output_of: OutputOf, tmp_path: Path) -> None:
    sizes = ("--layers", "2", "--hidden-size", "256", "--ffn-hidden-size", "512")
    reported = output_of(benchmarks.adapter_save, *sizes, "--rounds", "1", "--folder", tmp_path)
    for way in ("megatron", "kit"):
        assert (
            len(reported[f"{way}_seconds"]) == 1
            and min(reported[f"{way}_seconds"]) > 0
            and reported[f"{way}_peak_gb"] > 0
        )
    assert not any(tmp_path.iterdir())

"""The model that the benches make: what it says it is, the same whatever the workers; and the bench of conversion."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.convert import Floor
from benchmarks.make_mixtral import make, scaled
from tests.multiprocess.verbs.test_export import hf_tensors_of
from tests.multiprocess.weights.test_convert import convert_quietly


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


def test_the_bench_of_conversion_measures_every_way_it_is_asked_for(tmp_path: Path) -> None:
    sizes = ("--layers", "1", "--hidden-size", "512", "--ffn-hidden-size", "256", "--vocab-size", "1024")
    ways = ("copy", "stream", "read", "direct")
    words = (*sizes, "--rounds", "1", "--places", "disk", "--ways", *ways, "--folder", tmp_path)
    reported = output_of("convert", *words)["disk"]
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


def test_the_bench_of_starts_reads_less_from_the_quantized_cache(tmp_path: Path) -> None:
    sizes = ("--layers", "2", "--hidden-size", "512", "--ffn-hidden-size", "1024", "--vocab-size", "1024")
    only = ("--bases", "hf", "--precisions", "nf4")
    reported = output_of("quantized_start", *sizes, *only, "--rounds", "1", "--folder", tmp_path)
    assert len(reported) == 3
    quantized, kept, taken = (reported[f"hf nf4 {way}"] for way in ("quantised", "kept", "taken"))
    assert quantized["gb_read"] > 2.5 * taken["gb_read"] > 0
    assert kept["gb_written"] > quantized["gb_written"]
    assert not any(tmp_path.iterdir())


def test_the_bench_of_saving_measures_both_ways(tmp_path: Path) -> None:
    sizes = ("--layers", "2", "--hidden-size", "256", "--ffn-hidden-size", "512")
    reported = output_of("adapter_save", *sizes, "--rounds", "1", "--folder", tmp_path)
    for way in ("megatron", "kit"):
        assert (
            len(reported[f"{way}_seconds"]) == 1
            and min(reported[f"{way}_seconds"]) > 0
            and reported[f"{way}_peak_gb"] > 0
        )
    assert not any(tmp_path.iterdir())


def output_of(bench: str, *words: object) -> dict[str, Any]:
    """The JSON object that a bench ends with."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{bench}", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reported: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return reported

"""Model loads with experts in 8 or 4 bit, and functions that damage the quantized cache."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from isal.isal_zlib import crc32

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.terminal.report import Report
from mixtral_run.train.load_model import load_for_training
from mixtral_run.train.quantized_experts import CacheOptions
from mixtral_run.weights.hf.hf_weights import open_hf_weights
from mixtral_run.weights.manifest.checkpoint_folder import LATEST
from mixtral_run.weights.manifest.describe import describe_base
from mixtral_run.weights.mapping.hf_to_megatron import LINEAR_FC1_KEY, LINEAR_FC2_KEY
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader

RECORD = "mixtral_run.json"

KEPT_NUMBERS = {"fp8": (1, (2956774260, 624785096)), "nf4": (1, (1562107598, 4143949998))}
"""Expected result of quantizing `weight_to_keep` on every device: the version, CRC-32 of values and scales."""


def weight_to_keep() -> torch.Tensor:
    """Return a weight [64, 4096] in bf16, the same on every machine: rows of many magnitudes, and one of zeros."""
    numbers = (torch.arange(64 * 4096, dtype=torch.int64) * 2654435761 % 65521 - 32760).view(64, 4096)
    weight = (numbers * torch.arange(64)[:, None]).double() / 2**20
    return weight.bfloat16()


def checksums_of(tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
    """Return the CRC-32 of the bytes of each tensor."""
    return tuple(crc32(each.cpu().contiguous().view(-1).view(torch.uint8).numpy().data) for each in tensors)


@dataclass
class Start:
    """Result of a model load: the experts, the fingerprint, and the output."""

    experts: dict[str, torch.Tensor]
    fingerprint: str
    said: str


def start(
    base: Path,
    mode: str = "yes",
    precision: str = "fp8",
    dtype: str = "auto",
    reserve: int = 0,
    device: str = "cpu",
) -> Start:
    """Load the base in this process as `finetune` does, with --quantized-cache as `mode`."""
    config = FinetuneConfig(
        load=base,
        save=base.parent / "adapter",
        mock_data=True,
        device=device,
        dtype=dtype,
        tensor_model_parallel_size=1,
        expert_model_parallel_size=1,
    ).check()
    stream = io.StringIO()
    with open_mesh(config) as mesh:
        lora = LoraSettings(4, 8.0, 0.0, config.lora_target_modules, 1)
        keep = CacheOptions(mode, Report(stream), reserve)
        model = load_for_training(
            config, describe_base(base), mesh, lora, recompute="none", base_precision=precision, cache=keep
        )
        assert all(linear.weight is None for each in model.experts for linear in each.linears.values())
        buffers = {name: each.clone() for name, each in model.gpt.named_buffers() if ".experts." in name}
        return Start(buffers, model.base_fingerprint, stream.getvalue())


def same(first: Start, second: Start) -> bool:
    assert len(first.experts) == 2 * 2 * 2
    assert first.experts.keys() == second.experts.keys()
    return first.fingerprint == second.fingerprint and all(
        torch.equal(tensor.view(torch.uint8), second.experts[name].view(torch.uint8))
        for name, tensor in first.experts.items()
    )


def took(run: Start) -> bool:
    """Return True if the load read the quantized cache without a warning and without writing it."""
    return (
        "from the quantized cache" in run.said and "!" not in run.said and "Writing the quantized cache" not in run.said
    )


def folder_of(base: Path) -> Path:
    return base / "quantised-fp8"


def leftovers(base: Path) -> list[str]:
    return [path.name for path in base.iterdir() if path.name.startswith(".quantised")]


def edit_record(base: Path, change: Callable[[dict], object]) -> None:
    path = folder_of(base) / RECORD
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def flip(file: Path, position: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 1]))


def wipe_experts(base: Path) -> None:
    """Overwrite the experts of the base with 0xff bytes. Sizes and times stay, so that only a read shows the change."""
    places = []
    if (base / LATEST).exists():
        folder = next(base.glob("iter_*"))
        with Reader(folder) as reader:
            items = [item for key in (LINEAR_FC1_KEY, LINEAR_FC2_KEY) for item in reader.chunks(key)]
        places = [(folder / item.file, item.start, item.length) for item in items]
    else:
        sources = open_hf_weights(base).sources
        places = [(each.file, each.start, each.num_bytes) for name, each in sources.items() if ".experts." in name]
    assert len(places) > 30
    for file, first, length in places:
        times = file.stat()
        with file.open("r+b") as stream:
            stream.seek(first)
            stream.write(b"\xff" * length)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


STALE: dict[str, Callable[[dict], object]] = {
    "another base": lambda record: record["base"].update(fingerprint="0" * 16 + "-" + "1" * 48),
    "another iteration": lambda record: record["base"].update(iteration="iter_0000009"),
    "other numbers": lambda record: record.update(method=0),
    "another layout of the files": lambda record: record.update(layout=0),
    "another dtype first": lambda record: record.update(dtype="bfloat16"),
    "another model": lambda record: record["architecture"].update(num_layers=3),
    "no checksum": lambda record: record["tensors"].popitem(),
}

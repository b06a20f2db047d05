"""Run under torchrun: every rank's experts quantized, kept, and read again, in several layouts, written as JSON.

torchrun … quantized_cache_worker.py BASE OUT.json PRECISION DTYPE TPxEP [TPxEP …]
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from isal.isal_zlib import crc32

from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh, open_mesh
from mixtral_run.train.quantized_experts import CacheOptions
from mixtral_run.weights.quantized_cache.layout import cache_folder
from tests.multiprocess.training.layouts_worker import config_of, train
from tests.multiprocess.weights.direct_load_worker import counted_reads


def sums_of(model: MixtralModel) -> dict[str, str]:
    """CRC-32 of every parameter and buffer, with its dtype and shape."""
    tensors = {**dict(model.gpt.named_parameters()), **dict(model.gpt.named_buffers())}
    return {
        name: f"{tensor.dtype} {list(tensor.shape)} "
        f"{crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data):08x}"
        for name, tensor in tensors.items()
        if tensor is not None and tensor.numel()
    }


def expert_bytes(model: MixtralModel) -> int:
    return sum(
        tensor.nbytes
        for experts in model.experts
        for linear in experts.linears.values()
        for tensor in (linear.values, linear.scales)
        if tensor is not None
    )


def try_layout(mesh: Mesh, base: Path, out: Path, precision: str, dtype: str, layout: str) -> dict[str, Any]:
    """Sums and losses of a run that quantizes, of one that keeps what it quantized, and of one that reads it."""
    config = config_of(base, out, layout, dtype=dtype)
    folder = cache_folder(base, precision)
    if mesh.is_first:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    runs: dict[str, Any] = {}
    for name, mode in (("quantised", "no"), ("kept", "yes"), ("read", "use")):
        with counted_reads() as reads:
            done = train(config, mesh, 0, 2, base_precision=precision, cache=CacheOptions(mode))
        model = done["model"]
        runs[name] = {
            "sums": sums_of(model),
            "figures": done["figures"],
            "fingerprint": model.base_fingerprint,
            "read": sum(reads),
            "expert_bytes": expert_bytes(model),
            "num_experts": len(model.experts) * len(model.experts[0].linear_fc1.values),
        }
        dist.barrier()
        runs[name]["folder"] = folder.is_dir()
    runs["files"] = {file.name: crc32(file.read_bytes()) for file in sorted(folder.glob("*.safetensors"))}
    runs["left"] = sorted(path.name for path in base.iterdir() if path.name.startswith("."))
    return runs


def main() -> None:
    base, out, precision, dtype, *layouts = sys.argv[1:]
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    outcomes = {}
    for layout in layouts:
        with open_mesh(config_of(Path(base), Path(out), layout, dtype=dtype)) as mesh:
            mine = try_layout(mesh, Path(base), Path(out), precision, dtype, layout)
            everyones: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyones, mine)
            outcomes[layout] = everyones
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()

"""Run under torchrun: every rank's parameters from an HF directory and from its converted checkpoint, compared.

torchrun … direct_load_worker.py HF_DIRECTORY CHECKPOINT OUT.json TPxEP DTYPE
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.train.load_model import load_for_inference
from mixtral_run.weights.hf.hf_weights import open_hf_weights
from mixtral_run.weights.load import read_parts as direct_load
from mixtral_run.weights.manifest.describe import describe_base
from tests.multiprocess.training.layouts_worker import config_of, train


@contextlib.contextmanager
def counted_reads() -> Iterator[list[int]]:
    """The lengths of what this process reads of the weights."""
    read, lengths = direct_load.read_whole, list[int]()

    def counting(descriptor: int, block: memoryview, position: int, file: Path) -> None:
        lengths.append(len(block))
        read(descriptor, block, position, file)

    direct_load.read_whole = counting
    try:
        yield lengths
    finally:
        direct_load.read_whole = read


def own_bytes(parameters: dict[str, torch.Tensor], item_size: int, tp: int) -> int:
    """Return the parameters as the HF files have them. Rows of linear_proj, whose columns are split, are read whole."""
    return sum(
        parameter.numel() * item_size * (tp if "linear_proj" in name else 1) for name, parameter in parameters.items()
    )


def main() -> None:
    hf, checkpoint, out, layout, dtype = (*map(Path, sys.argv[1:4]), *sys.argv[4:6])
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    config = config_of(checkpoint, out, layout, dtype=dtype)
    direct = config_of(hf, out, layout, dtype=dtype)
    with open_mesh(config) as mesh:
        with counted_reads() as from_checkpoint:
            models = [load_for_inference(config, describe_base(checkpoint), mesh, None)]
        with counted_reads() as reads:
            models.append(load_for_inference(direct, describe_base(hf), mesh, None))
        first, second = (dict(model.gpt.named_parameters()) for model in models)
        unequal = [name for name in first if not torch.equal(first[name], second[name])]
        assert first.keys() == second.keys()
        assert len(first) > 10
        assert all(parameter.dtype == torch.float32 for parameter in first.values()) == (dtype == "fp32")
        figures = [train(each, mesh, 0, 2)["figures"] for each in (config, direct)]
        mine = {
            "checkpoint_bytes": [sum(from_checkpoint), own_bytes(first, open_hf_weights(hf).item_size, 1)],
            "bytes": [sum(reads), own_bytes(second, open_hf_weights(hf).item_size, config.tensor_model_parallel_size)],
            "unequal": unequal,
            "fingerprints": [model.base_fingerprint for model in models],
            "figures": figures,
        }
        everyones: list[object] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, mine)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(everyones))
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()

"""Run under torchrun: every rank's parameters from an HF directory and from its converted checkpoint, compared.

torchrun … direct_load_worker.py HF_DIRECTORY CHECKPOINT OUT.json TPxEP DTYPE
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from mixtral_run.checkpoints import describe_base
from mixtral_run.model.parallel import processes
from mixtral_run.train.model import load_for_inference
from tests.integration.layouts_worker import config_of, train


def main() -> None:
    hf, checkpoint, out, layout, dtype = (*map(Path, sys.argv[1:4]), *sys.argv[4:6])
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    config = config_of(checkpoint, out, layout, dtype=dtype)
    direct = config_of(hf, out, layout, dtype=dtype)
    with processes(config) as here:
        models = [load_for_inference(each, describe_base(each.load), here, None) for each in (config, direct)]
        first, second = (dict(model.gpt.named_parameters()) for model in models)
        unequal = [name for name in first if not torch.equal(first[name], second[name])]
        assert first.keys() == second.keys()
        assert len(first) > 10
        assert all(parameter.dtype == torch.float32 for parameter in first.values()) == (dtype == "fp32")
        figures = [train(each, here, 0, 2)["figures"] for each in (config, direct)]
        mine = {
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

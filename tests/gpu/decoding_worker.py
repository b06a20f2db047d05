"""Run under torchrun: logits of prompts and of tokens after them, launched and recorded, in several layouts, as JSON.

torchrun … decoding_worker.py OUT.json TPxEP:PRECISION:adapted|base …
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from mixtral_run.config import LaunchConfig
from mixtral_run.decoding import Decoding, RecordedDecoding, decoding_of
from mixtral_run.model.build import is_adapter
from mixtral_run.model.parallel import Processes, processes
from tests.gpu.test_kernels import small_model

LENGTHS = (7, 5, 7)
NEW = 24


@torch.inference_mode()
def run(here: Processes, precision: str, adapted: bool) -> list[list[float]]:
    """Of each pass the largest difference of the two ways' logits, and the largest logit."""
    model = small_model(here, "none", precision, sequence_parallel=False, adapted=adapted).eval()
    for name, weight in model.named_parameters():
        if is_adapter(name):  # whose second halves begin with zeros
            weight.data.normal_(0.0, 0.05, generator=torch.Generator("cuda").manual_seed(len(name)))
    assert decoding_of(model, len(LENGTHS), NEW) is RecordedDecoding
    longest = max(LENGTHS)
    draw = torch.Generator("cuda").manual_seed(1)
    rows = torch.randint(1, 1024, (len(LENGTHS), longest + NEW), generator=draw, device=here.device)
    padding = longest - torch.tensor(LENGTHS, device=here.device)
    found = []
    for kind in (Decoding, RecordedDecoding):
        passes = kind(model, padding, longest + NEW)
        logits = [passes(rows[:, :longest]), *(passes(rows[:, [at]]).clone() for at in range(longest, longest + NEW))]
        if isinstance(passes, RecordedDecoding):
            assert passes.is_recorded
        passes.end()
        found.append(torch.stack(logits).float())
    grown, recorded = found
    return torch.stack(((grown - recorded).abs().amax((1, 2)), grown.abs().amax((1, 2))), dim=1).tolist()


def main() -> None:
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl")
    found = {}
    for case in sys.argv[2:]:
        layout, precision, which = case.split(":")
        tp, ep = (int(number) for number in layout.split("x"))
        config = LaunchConfig(tensor_model_parallel_size=tp, expert_model_parallel_size=ep, device="cuda")
        with processes(config) as here:
            found[case] = run(here, precision, which == "adapted")
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("ignore")
    main()

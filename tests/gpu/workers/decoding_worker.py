"""Run under torchrun: logits of prompts and of tokens after them, launched and recorded, in several layouts, as JSON.

torchrun … decoding_worker.py OUT.json TPxEP:PRECISION:adapted|base …
"""

from __future__ import annotations

from typing import Any

import torch

from mixtral_run.inference.decode import CapturedDecoding, Decoding, decoding_of
from mixtral_run.model.mixtral import MixtralModel, is_adapter
from mixtral_run.model.parallel.mesh import Mesh
from tests.gpu.kernels.test_kernels import small_model
from tests.gpu.workers.cases import run_cases

LENGTHS = ((7, 5, 7), (6,))
"""Of prompts that are continued together; a single row takes kernels of its own."""
NEW = 24


def run(mesh: Mesh, precision: str, which: str) -> list[dict[str, Any]]:
    """Return, for each of LENGTHS, whether passes were captured, and for each pass the largest difference between the
    logits of the two ways, and the largest logit. The caller judges them, so that all cases are run.

    All experts are chosen: near a tie rounding would decide which, and the logits of both ways would be unrelated.
    """
    model = small_model(mesh, "none", precision, sequence_parallel=False, adapted=which == "adapted").eval()
    for name, weight in model.named_parameters():
        if is_adapter(name):  # whose second halves begin with zeros
            weight.data.normal_(0.0, 0.05, generator=torch.Generator("cuda").manual_seed(len(name)))
    for layer in model.gpt.decoder.layers:
        layer.mlp.router.topk = model.architecture.num_experts
    return [compare(model, lengths) for lengths in LENGTHS]


def compare(model: MixtralModel, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Return what `run` returns for rows whose prompts have these lengths."""
    device = model.mesh.device
    captured = decoding_of(model, len(lengths), NEW) is CapturedDecoding
    longest = max(lengths)
    draw = torch.Generator("cuda").manual_seed(1)
    rows = torch.randint(1, 1024, (len(lengths), longest + NEW), generator=draw, device=device)
    padding = longest - torch.tensor(lengths, device=device)
    found = []
    for kind in (Decoding, CapturedDecoding):
        with torch.inference_mode():
            passes = kind(model, padding, longest + NEW)
            further = (passes(rows[:, [at]]).clone() for at in range(longest, longest + NEW))
            logits = torch.stack([passes(rows[:, :longest]), *further])
            if isinstance(passes, CapturedDecoding):
                captured = captured and passes.is_captured
            passes.end()
        found.append(logits.float())
    grown, fixed = found
    figures = torch.stack(((grown - fixed).abs().amax((1, 2)), grown.abs().amax((1, 2))), dim=1)
    return {"captured": captured, "passes": figures.tolist()}


if __name__ == "__main__":
    run_cases(run)

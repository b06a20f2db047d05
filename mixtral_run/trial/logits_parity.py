"""Comparison of a converted checkpoint's logits with HF's, which proves that both are the same model.

With an adapter, the reference is the exported adapter that PEFT loads on the HF model.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixtral_run.config.verbs.weights import VerifyConfig
from mixtral_run.errors import CheckFailed
from mixtral_run.launch import processes
from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.templates.prompt import load_tokenizer
from mixtral_run.train.load_model import load_for_inference, pick_dtype
from mixtral_run.weights.adapter.given_adapter import describe_given_adapter
from mixtral_run.weights.adapter.peft_directory import check_peft
from mixtral_run.weights.hf.hf_weights import open_hf_weights
from mixtral_run.weights.io.files import write_atomically
from mixtral_run.weights.manifest.describe import check_adapter_fits, describe_base

PROMPTS = (
    "The three states of matter that people meet every day are",
    "[INST] Write one line of Python that reverses a string. [/INST]",
    "In 1969, two people walked on the Moon; the third, who stayed in orbit,",
)
LARGEST_EXACT_BYTES = 8 * 1024**3
"""Largest size in float64 of a model whose reference is computed in float64."""


@dataclass(frozen=True)
class LogitsComparison:
    """Largest difference over all positions and the whole vocabulary, with the tolerance."""

    largest_difference: float
    largest_logit: float
    tolerance: float
    same_choices: float
    """Fraction of positions at which both models have the same likeliest token."""
    num_tokens: int
    dtype: str
    layout: str

    @property
    def passed(self) -> bool:
        return self.largest_difference <= self.tolerance


def compare_logits(config: VerifyConfig) -> None:
    """Compare, print, write `logits_file`. All ranks must call. Raises CheckFailed if the logits differ."""
    assert config.against is not None
    against = open_hf_weights(config.against)
    if against.renamed:
        if processes.rank() == 0:
            Report.on_stderr().warn(
                f"logits are not compared: transformers does not find the weights of {config.against} by their names"
            )
        return
    base = describe_base(config.load)
    adapter = describe_given_adapter(config.adapter, base.architecture) if config.adapter is not None else None
    if adapter is not None:
        check_adapter_fits(adapter, base)
    tokenizer = load_tokenizer(base.tokenizer)
    rows = [list(tokenizer.encode(text)) for text in PROMPTS]
    with open_mesh(config) as mesh:
        model = load_for_inference(config, base, mesh, adapter)
        with torch.inference_mode():
            ours = [model.logits(torch.tensor([row], device=mesh.device)).double().cpu()[0] for row in rows]
        if not mesh.is_first:
            return
        dtype = pick_dtype(config.dtype, base, mesh.device)
        # float64 excludes HF's rounding, as large as the kit's, from the difference; it needs twice the memory.
        exact = dtype is torch.float32 and base.architecture.num_parameters * 8 <= LARGEST_EXACT_BYTES
        stored: torch.dtype | None = getattr(torch, against.dtype) if against.recast else None
        theirs = reference_logits(config.against, config.peft_path, rows, torch.float64 if exact else dtype, stored)
        comparison = _compare(ours, theirs, config, str(dtype).removeprefix("torch."))
    report = Report.on_stderr() if config.json else Report()
    _report_comparison(comparison, config, report)


def reference_logits(
    hf_model_path: Path,
    peft_path: Path | None,
    rows: Sequence[Sequence[int]],
    dtype: torch.dtype,
    stored: torch.dtype | None = None,
) -> list[Tensor]:
    """Return HF's logits, computed on the CPU in `dtype`: for each row fp64 [tokens, vocabulary].

    peft_path: the adapter that PEFT loads on the model, or None. stored: the dtype to which all weights are cast first,
    as transformers itself casts weights of several dtypes.
    """
    from transformers import AutoModelForCausalLM

    first = stored if stored is not None and stored.itemsize < dtype.itemsize else dtype
    model = AutoModelForCausalLM.from_pretrained(
        # HF's grouped product of experts does not support float64.
        str(hf_model_path), dtype=first, local_files_only=True,
        **({"experts_implementation": "eager"} if dtype is torch.float64 else {}),
    )  # fmt: skip
    if first != dtype:
        model.type(dtype)
    if peft_path is not None:
        from peft import PeftModel, __version__

        check_peft(peft_path, __version__)
        model = PeftModel.from_pretrained(model, str(peft_path))
    if dtype is torch.float64:
        model.double()  # PEFT keeps adapters in float32.
    model.requires_grad_(False).train(False)
    with torch.inference_mode():
        return [model(torch.tensor([row])).logits[0].double() for row in rows]


def _compare(ours: Sequence[Tensor], theirs: Sequence[Tensor], config: VerifyConfig, dtype: str) -> LogitsComparison:
    mine, reference = torch.cat(list(ours)), torch.cat(list(theirs))
    return LogitsComparison(
        largest_difference=float((mine - reference).abs().max()),
        largest_logit=float(reference.abs().max()),
        tolerance=config.logits_tolerance,
        same_choices=float((mine.argmax(-1) == reference.argmax(-1)).float().mean()),
        num_tokens=reference.shape[0],
        dtype=dtype,
        layout=f"TP{config.tensor_model_parallel_size}/EP{config.expert_model_parallel_size}",
    )


def _next_command(comparison: LogitsComparison, config: VerifyConfig) -> str:
    """Return the command that separates rounding, the layout and damaged weights as causes of a difference."""
    words = "mixtral-run " + shlex.join(["verify", "--load", str(config.load), "--against", str(config.against)])
    if comparison.dtype != "float32":
        return f"{words} --dtype fp32, in which rounding is too small to matter"
    if (config.tensor_model_parallel_size, config.expert_model_parallel_size) != (1, 1):
        return f"{words}, in one process: TP1/EP1"
    return f"{words} --proof, which reads every byte of the checkpoint"


def _report_comparison(comparison: LogitsComparison, config: VerifyConfig, report: Report) -> None:
    if config.logits_file is not None:
        write_atomically(
            config.logits_file, json.dumps({**asdict(comparison), "passed": comparison.passed}, indent=2) + "\n"
        )
    other = "HF with the exported adapter" if config.peft_path is not None else "HF"
    text = (
        f"logits against {other} ({comparison.dtype}, {comparison.layout}, {comparison.num_tokens} tokens): "
        f"largest difference {comparison.largest_difference:.2e}, allowed {comparison.tolerance:.0e}"
    )
    # Written so that NaN fails.
    if not comparison.passed:
        raise CheckFailed(
            f"The converted model does not compute the logits of {other}.",
            where=str(config.load),
            expected=f"logits within {comparison.tolerance:.0e}",
            found=f"a difference of {comparison.largest_difference:.3e}; logits reach {comparison.largest_logit:.3g}",
            next_command=_next_command(comparison, config),
        )
    report.done(text)

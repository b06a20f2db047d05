"""The model card of an exported adapter: README.md in the PEFT directory, as the hub reads it.

It holds no path of the machine that trained: the card may be published.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mixtral_run import __version__
from mixtral_run.config.former_settings import with_former
from mixtral_run.config.names.hub_names import hub_name_and_revision, may_be_hub_name
from mixtral_run.weights.adapter.adapter_sum import AdapterSum
from mixtral_run.weights.adapter.checkpoint import OpenAdapter
from mixtral_run.weights.adapter.peft_directory import PeftDirectory
from mixtral_run.weights.adapter.peft_layouts import max_lora_rank
from mixtral_run.weights.io.files import write_atomically

CARD = "README.md"
SETTINGS = (
    "train_iters", "epochs", "global_batch_size", "micro_batch_size", "seq_length", "pack", "lr", "min_lr",
    "lr_warmup_iters", "lr_scheduler", "weight_decay", "clip_grad", "base_precision", "attention_precision",
    "dtype", "seed",
)  # fmt: skip
"""Settings of a run that the card shows. None of them names a file."""
FOR_WHOM = {
    "peft": "PEFT, and engines that read a pair of matrices for each expert",
    "peft-fused": "PEFT only, from the version in mixtral_run.json on. Not for vLLM, which reads the rows of stacked "
    "experts in another order and answers wrongly",
    "vllm": "vLLM and SGLang; PEFT reads it as well",
}


def write_card(folder: Path, adapters: AdapterSum, peft: PeftDirectory, layout: str, base_name: str | None) -> None:
    """Write the card of an adapter. base_name: its HF model, a name on the hub or a directory."""
    write_atomically(folder / CARD, card_of(adapters, peft, layout, base_name))


def card_of(adapters: AdapterSum, peft: PeftDirectory, layout: str, base_name: str | None) -> str:
    """Return the text of the card: front matter for the hub, base, data, settings, losses and use."""
    adapter = adapters.first
    manifest = adapter.manifest
    name = published_name(base_name)
    front = ["---", "library_name: peft", "pipeline_tag: text-generation", "tags:", "  - lora", "  - mixtral"]
    front += [f"base_model: {json.dumps(name)}"] if name else []
    base = f"[{name}](https://huggingface.co/{name})" if name else "a Mixtral model that was read from a directory"
    template = manifest.chat_template.describe() if manifest.chat_template is not None else "not recorded"
    facts = [("base", base), ("fingerprint of the base", f"`{adapter.base_fingerprint}`")]
    for number, each in enumerate(adapters.summands, 1):
        of_several = "" if adapters.is_plain else f"adapter {number}: "
        facts += [(f"adapter {number}: weight", f"{each.weight:g}")] if of_several else []
        facts += [(of_several + key, value) for key, value in _training(each.adapter)]
    facts.append(("chat template", template))
    facts += _losses(adapter) if adapters.is_plain else []
    settings = [
        (key, with_former(key, _shown(manifest.training[key]), manifest.former))
        for key in SETTINGS
        if manifest.training.get(key) is not None
    ]
    lines = [*front, "---", "", "# LoRA adapter for Mixtral", "", *_table(("", ""), facts)]
    if settings and len(adapters.summands) == 1:
        lines += ["", "## Settings of the training", "", *_table(("setting", "value"), settings)]
    lines += ["", "## Use", "", f"Layout `{layout}`: for {FOR_WHOM[layout]}.", "", "```python", *_python(name), "```"]
    if layout != "peft-fused":
        rank = max_lora_rank(peft.max_rank)
        serve = f"vllm serve {name or 'BASE'} --enable-lora --max-lora-rank {rank} --lora-modules adapter=FOLDER"
        lines += ["", "```", serve, "```"]
    return "\n".join([*lines, "", f"Written by mixtral-run {__version__}.", ""])


def _training(adapter: OpenAdapter) -> list[tuple[str, str]]:
    """Return what the card says of one adapter that was trained."""
    manifest, lora = adapter.manifest, adapter.lora
    dropout = f"dropout {with_former('lora_dropout', f'{lora.dropout:g}', manifest.former)}"
    return [
        ("iteration", f"{manifest.iteration:,}"),
        ("LoRA", f"{lora.describe()}, {dropout}, {', '.join(lora.target_modules)}"),
        ("data, SHA-256", f"`{manifest.data_sha256}`" if manifest.data_sha256 else "not recorded"),
    ]


def published_name(base_name: str | None) -> str | None:
    """Return the name of a base on the hub, without its revision; None for a directory of this machine."""
    if base_name is None or Path(base_name).is_absolute() or not may_be_hub_name(base_name):
        return None
    return hub_name_and_revision(base_name)[0]


def _losses(adapter: OpenAdapter) -> list[tuple[str, str]]:
    state, validation = adapter.manifest.state, adapter.manifest.validation
    found = []
    if state.recent_losses:
        found.append(("training loss, last", f"{state.recent_losses[-1]:.4f}"))
    if state.validation_loss is not None:
        found.append(("validation loss of this iteration", f"{state.validation_loss:.4f}"))
    best, at = validation.get("best_loss"), validation.get("best_iteration")
    if isinstance(best, (int, float)) and isinstance(at, int):
        found.append(("validation loss, lowest of the run", f"{best:.4f} at iteration {at:,}"))
    return found


def _python(name: str | None) -> list[str]:
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(name or 'BASE')}, dtype='bfloat16')",
        "model = PeftModel.from_pretrained(base, 'FOLDER')",
    ]


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> list[str]:
    return [
        f"| {head[0]} | {head[1]} |",
        "|---|---|",
        *(f"| {key} | {value.replace('|', '/')} |" for key, value in rows),
    ]


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

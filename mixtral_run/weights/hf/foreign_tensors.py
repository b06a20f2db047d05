"""Recognize by their tensors models that are a Mixtral in another form, and name the way on. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mixtral_run.model.hf_config import UNQUANTIZED
from mixtral_run.weights.hf.safetensors_files import TensorEntry

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that torch.compile, FSDP and activation checkpointing add to the modules that they wrap."""

MERGE = "merge it: PeftModel.from_pretrained(base, ADAPTER).merge_and_unload().save_pretrained(OTHER_DIR)"


@dataclass(frozen=True)
class Foreign:
    """A recognized form: what was found, and what to do."""

    what: str
    next_command: str


def unwrapped(entries: Mapping[str, TensorEntry]) -> tuple[dict[str, TensorEntry], list[str]]:
    """Return the tensors under the names that they have without wrappers, and a line for the user if any had one.

    Two tensors of one name keep their own names, which are then reported as unknown.
    """
    found: dict[str, TensorEntry] = {}
    removed: set[str] = set()
    everywhere = bool(entries) and all(name.startswith("module.") for name in entries)
    for name, entry in entries.items():
        parts = name.split(".")
        kept = [part for part in (parts[1:] if everywhere else parts) if part not in WRAPPERS]
        clean = ".".join(kept)
        if clean in found or (clean != name and clean in entries):
            clean = name
        else:
            removed.update(part for part in parts if part in WRAPPERS)
            removed.update(("module",) if everywhere else ())
        found[clean] = entry
    if not removed:
        return dict(entries), []
    words = ", ".join(f"{each}." for each in sorted(removed))
    return found, [f"names of tensors hold {words} from torch.compile, DDP or FSDP; they are read without it"]


def foreign_form(entries: Mapping[str, TensorEntry]) -> Foreign | None:
    """Return the other form in which these tensors are, or None."""
    quantized = _quantization(entries)
    if quantized is not None:
        method, name = quantized
        return Foreign(f"the weights are quantized with {method} (tensor {name})", UNQUANTIZED)
    for name in entries:
        if ".lora_A." in name or ".lora_B." in name or ".base_layer." in name:
            return Foreign(f"a PEFT adapter is in the model, and not merged (tensor {name})", MERGE)
        if name.startswith(("score.", "classifier.", "model.score.")):
            return Foreign(
                f"a model for sequence classification: tensor {name} in place of lm_head.weight",
                "give the model that the classifier was made from: without lm_head nothing can generate text",
            )
        if name.startswith(("tok_embeddings.", "layers.0.attention.")):
            return Foreign(
                f"weights in Mistral AI's own format (tensor {name})",
                "give the repository's model-*.safetensors, or run transformers' convert_mixtral_weights_to_hf.py",
            )
    if "lm_head.weight" not in entries and "embed_tokens.weight" in entries:
        return Foreign(
            "the decoder alone, without lm_head (tensor embed_tokens.weight)",
            "save the whole model: AutoModelForCausalLM, not AutoModel",
        )
    return None


def _quantization(entries: Mapping[str, TensorEntry]) -> tuple[str, str] | None:
    """Return the method by which weights are quantized, and a tensor that shows it."""
    endings = {name.rsplit(".", 1)[-1]: name for name in entries}
    for name in entries:
        if ".quant_state." in name:
            return "bitsandbytes, 4 bit", name
    for ending, method in (
        ("SCB", "bitsandbytes, 8 bit"),
        ("absmax", "bitsandbytes, 4 bit"),
        ("quant_map", "bitsandbytes, 4 bit"),
        ("weight_packed", "compressed-tensors"),
        ("g_idx", "GPTQ"),
        ("qweight", "AWQ"),
        ("weight_scale_inv", "fp8"),
        ("weight_scale", "fp8"),
    ):
        if ending in endings:
            return method, endings[ending]
    for name, entry in entries.items():
        if entry.dtype.startswith("F8_"):
            return "fp8", name
    return None

"""What the kit does with each field of an HF model's config.json. Standard library only.

The table names every field of transformers' MixtralConfig, and those that earlier versions wrote. A field that is not
in it is reported by name, because nothing is known about its effect.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

USED, HARMLESS, REFUSED, REPORTED = "used", "harmless", "refused", "reported"
"""Decisions: the value is used; it changes nothing that the kit computes; values other than the accepted ones are
refused; values other than the accepted ones are left out, and the user is told."""

MIXTRAL = "MixtralForCausalLM"
DEFAULT_ROTARY_BASE = 1e6
DEFAULT_POSITIONS = 131072
"""Values of MixtralConfig for a config.json without the field."""

QUANTIZATION_NAMES = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes 4 bit",
    "bitsandbytes_8bit": "bitsandbytes 8 bit",
    "fp8": "fp8",
    "fbgemm_fp8": "fp8 (FBGEMM)",
    "compressed-tensors": "compressed-tensors",
}
"""Values of quant_method, and the names that people know."""

UNQUANTIZED = (
    "give the model that was quantized, in bf16 or fp16; finetune --base-precision nf4 or fp8 then stores "
    "its experts in 4 or 8 bit"
)
"""The way on for every quantized model."""


@dataclass(frozen=True)
class Decision:
    """The decision about one field.

    kind: one of the four above. why: the reason. accepted: the values that REFUSED and REPORTED take as they are, next
    to a missing field and null.
    """

    kind: str
    why: str
    accepted: tuple[Any, ...] = ()


_TRAINING_ONLY = "it acts in training only, and the kit trains without it; set it to 0 in config.json"
_GENERATION = Decision(HARMLESS, "a setting of transformers' own generation")
_HEAD = Decision(HARMLESS, "describes a classification head; `architectures` decides whether there is one")
_TRANSFORMERS = Decision(HARMLESS, "how transformers runs the model, not what it computes")
_TOKENS = Decision(HARMLESS, "the tokenizer's own special tokens are used")

LARGEST_SIZE = 2**31 - 1
MOST_EXPERTS = 100_000
"""Limits that no model reaches. Above them a damaged config.json would keep the kit busy for hours."""

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "num_local_experts",
    "num_experts_per_tok",
)
_OF_GENERATION = (
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip
_OF_TRANSFORMERS = (
    "transformers_version", "_name_or_path", "_commit_hash", "output_hidden_states", "output_attentions",
    "return_dict", "use_cache", "chunk_size_feed_forward", "torchscript", "use_bfloat16", "tf_legacy_loss",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "experts_implementation",
    "_experts_implementation", "_flash_attn_2_enabled", "tokenizer_class", "prefix", "task_specific_params",
    "finetuning_task", "initializer_range", "pretraining_tp", "unsloth_version", "unsloth_fixed",
)  # fmt: skip

DECISIONS: Mapping[str, Decision] = {
    **{name: Decision(USED, "a size of the model") for name in _SIZES},
    **dict.fromkeys(_OF_GENERATION, _GENERATION),
    **dict.fromkeys(_OF_TRANSFORMERS, _TRANSFORMERS),
    **dict.fromkeys(("id2label", "label2id", "num_labels", "problem_type"), _HEAD),
    **dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"), _TOKENS
    ),
    "model_type": Decision(USED, "has to be mixtral"),
    "architectures": Decision(USED, f"has to name {MIXTRAL}, if it names anything"),
    "num_experts": Decision(USED, "another name of num_local_experts"),
    "head_dim": Decision(USED, "a size of the model"),
    "max_position_embeddings": Decision(USED, "the longest sequence"),
    "rms_norm_eps": Decision(USED, "of the norms"),
    "rope_theta": Decision(USED, "the rotary base"),
    "rope_parameters": Decision(USED, "the rotary base, and that positions are not scaled"),
    "rope_scaling": Decision(USED, "the older name of rope_parameters"),
    "sliding_window": Decision(USED, "sequences may not be longer"),
    "dtype": Decision(USED, "the dtype of weights that are stored in several dtypes"),
    "torch_dtype": Decision(USED, "the older name of dtype"),
    "hidden_act": Decision(REFUSED, "the kit computes SwiGLU", ("silu", "swish")),
    "tie_word_embeddings": Decision(REFUSED, "a Mixtral has an output layer of its own", (False,)),
    "partial_rotary_factor": Decision(REFUSED, "the kit rotates whole heads", (1, 1.0)),
    "attention_bias": Decision(REFUSED, "the kit's attention has no biases", (False,)),
    "attention_dropout": Decision(REFUSED, _TRAINING_ONLY, (0, 0.0)),
    "router_jitter_noise": Decision(REFUSED, _TRAINING_ONLY, (0, 0.0)),
    "quantization_config": Decision(REFUSED, UNQUANTIZED),
    "compression_config": Decision(REFUSED, UNQUANTIZED),
    "is_encoder_decoder": Decision(REFUSED, "a Mixtral is a decoder", (False,)),
    "is_decoder": Decision(HARMLESS, "a Mixtral is a decoder, whatever it says"),
    "add_cross_attention": Decision(REFUSED, "a Mixtral has no cross-attention", (False,)),
    "cross_attention_hidden_size": Decision(REFUSED, "a Mixtral has no cross-attention"),
    "tie_encoder_decoder": Decision(REFUSED, "a Mixtral has no encoder", (False,)),
    "pruned_heads": Decision(REFUSED, "all heads have to be there", ({},)),
    "output_router_logits": Decision(
        REPORTED, "transformers then adds a load balancing loss in training, and the kit does not", (False,)
    ),
    "router_aux_loss_coef": Decision(HARMLESS, "the factor of that loss"),
    "auto_map": Decision(REPORTED, "it names code of the model's own; the kit computes a Mixtral"),
}

_ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def config_problems(values: Mapping[str, Any]) -> list[str]:
    """Return a line for each field that is not a Mixtral's, or whose value the kit cannot take."""
    problems = []
    if values.get("model_type") != "mixtral":
        problems.append(f"model_type: expected 'mixtral'; found {values.get('model_type')!r}")
    problems += _head_problems(values.get("architectures"))
    problems += _size_problems(values)
    for name in ("quantization_config", "compression_config"):
        if values.get(name):
            problems.append(
                f"{name}: the weights are quantized with {quantization(values[name])}: {_unquantized(values)}"
            )
    problems += [
        f"{name}: expected {_shown(decision.accepted)}; found {values[name]!r} ({decision.why})"
        for name, decision in DECISIONS.items()
        if decision.kind == REFUSED and decision.accepted and not _accepted(values.get(name), decision)
    ]
    if values.get("cross_attention_hidden_size") is not None:
        problems.append(f"cross_attention_hidden_size: expected null; found {values['cross_attention_hidden_size']!r}")
    return problems + _rope_problems(values)


def config_notes(values: Mapping[str, Any]) -> list[str]:
    """Return a line for each field that the kit does not use although it may matter."""
    notes = [
        f"config.json: {name} {values[name]!r} is not used: {decision.why}"
        for name, decision in DECISIONS.items()
        if decision.kind == REPORTED and not _accepted(values.get(name), decision)
    ]
    unknown = [name for name in values if name not in DECISIONS]
    unknown += [
        f"{group}.{name}"
        for group in ("rope_parameters", "rope_scaling")
        for name in (values.get(group) or {})
        if name not in _ROPE_KEYS
    ]
    if unknown:
        notes.append(f"config.json: fields that mixtral-run does not know are not used: {', '.join(sorted(unknown))}")
    return notes


def rotary_base(values: Mapping[str, Any]) -> float:
    """Return the rotary base of a config.json without problems."""
    return float(next(iter(_rotary_bases(values).values()), DEFAULT_ROTARY_BASE))


def quantization(config: object) -> str:
    """Return the name of the method of a quantization_config."""
    if not isinstance(config, Mapping):
        return str(config)[:40]
    method = str(config.get("quant_method") or config.get("quant_type") or "")
    if not method and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"
    name = QUANTIZATION_NAMES.get(method.lower(), method[:40] or "an unnamed method")
    bits = config.get("bits") or config.get("w_bit")
    if config.get("load_in_4bit"):
        bits = 4
    elif config.get("load_in_8bit"):
        bits = 8
    return f"{name}, {bits} bit" if isinstance(bits, int) else name


def set_in_config(directory: Path | str, name: str, value: Any) -> str:
    """Return a command that sets a field of DIRECTORY/config.json."""
    program = (
        "import json, pathlib, sys; p = pathlib.Path(sys.argv[1]); c = json.loads(p.read_text()); "
        f"c[{name!r}] = {value!r}; p.write_text(json.dumps(c, indent=2))"
    )
    return shlex.join(["python3", "-c", program, str(Path(directory) / "config.json")])


def _unquantized(values: Mapping[str, Any]) -> str:
    name = values.get("_name_or_path")
    known = isinstance(name, str) and name and len(name) <= 100 and name.isprintable()
    return f"{UNQUANTIZED} (config.json names {name!r})" if known else UNQUANTIZED


def _head_problems(architectures: object) -> list[str]:
    if not architectures or (isinstance(architectures, list) and MIXTRAL in architectures):
        return []
    names = ", ".join(map(str, architectures)) if isinstance(architectures, list) else str(architectures)
    line = f"architectures: expected {MIXTRAL}; found {names[:100]}"
    if "Classification" in names or "Reward" in names:
        line += " (a classification head in place of lm_head: it cannot generate text; give the model it was made from)"
    return [line]


def _size_problems(values: Mapping[str, Any]) -> list[str]:
    problems = []
    for name in _SIZES:
        found = values.get("num_experts") if name == "num_local_experts" and name not in values else values.get(name)
        if not _is_size(found):
            problems.append(f"{name}: expected a whole number above 0; found {_short(found)}")
    other = values.get("num_experts")
    if other is not None and values.get("num_local_experts", other) != other:
        problems.append(f"num_experts: expected num_local_experts ({values['num_local_experts']!r}); found {other!r}")
    problems += [
        f"{name}: expected a whole number above 0; found {_short(values[name])}"
        for name in ("head_dim", "max_position_embeddings", "sliding_window")
        if values.get(name) is not None and not _is_size(values[name])
    ]
    problems += [
        f"{name}: expected a number above 0; found {_short(values[name])}"
        for name in ("rms_norm_eps", "rope_theta")
        if values.get(name) is not None and not _is_positive(values[name])
    ]
    if problems:
        return problems
    experts = values["num_hidden_layers"] * (values.get("num_local_experts") or values["num_experts"])
    if experts > MOST_EXPERTS:
        return [f"num_hidden_layers × num_local_experts: expected at most {MOST_EXPERTS:,}; found {experts:,}"]
    heads, groups = values["num_attention_heads"], values["num_key_value_heads"]
    if heads % groups:
        problems.append(f"num_key_value_heads: expected a divisor of {heads} attention heads; found {groups}")
    if values.get("head_dim") is None and values["hidden_size"] % heads:
        problems.append(f"hidden_size: expected a multiple of {heads} attention heads; found {values['hidden_size']}")
    experts = values.get("num_local_experts", other)
    if values["num_experts_per_tok"] > experts:
        problems.append(f"num_experts_per_tok: expected at most {experts}; found {values['num_experts_per_tok']}")
    return problems


def _rope_problems(values: Mapping[str, Any]) -> list[str]:
    """Return the problems of all spellings of the rotary settings, which must not contradict each other."""
    problems = []
    for group in ("rope_parameters", "rope_scaling"):
        found = values.get(group)
        if found is None:
            continue
        if not isinstance(found, Mapping) or any(isinstance(each, Mapping) for each in found.values()):
            problems.append(f"{group}: expected one object of settings for all layers; found {str(found)[:60]}")
            continue
        for name in ("rope_type", "type"):
            if found.get(name, "default") not in ("default", None):
                problems.append(
                    f"{group}.{name}: expected 'default', since positions are not scaled; found {found[name]!r}"
                )
        if found.get("partial_rotary_factor", 1) not in (1, None):
            problems.append(
                f"{group}.partial_rotary_factor: expected 1, since whole heads are rotated; "
                f"found {found['partial_rotary_factor']!r}"
            )
        if found.get("rope_theta") is not None and not _is_positive(found["rope_theta"]):
            problems.append(f"{group}.rope_theta: expected a number above 0; found {found['rope_theta']!r}")
    if not problems:
        bases = _rotary_bases(values)
        if len({float(base) for base in bases.values() if _is_positive(base)}) > 1:
            texts = ", ".join(f"{name} {base!r}" for name, base in bases.items())
            problems.append(f"rope_theta: expected one rotary base; found {texts}")
    return problems


def _rotary_bases(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary base under each name that has one."""
    found = {"rope_theta": values.get("rope_theta")}
    for group in ("rope_parameters", "rope_scaling"):
        found[f"{group}.rope_theta"] = (values.get(group) or {}).get("rope_theta")
    return {name: base for name, base in found.items() if base is not None}


def _accepted(value: object, decision: Decision) -> bool:
    return value is None or any(value == each and type(value) is type(each) for each in decision.accepted)


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of over 40 digits"
    return text if len(text) <= 60 else f"{text[:60]}…"


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST_SIZE


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e300


def _shown(accepted: tuple[Any, ...]) -> str:
    value = accepted[0]
    return str(value).lower() if isinstance(value, bool) else repr(value)

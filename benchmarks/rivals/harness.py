"""Mixtral's sizes with random weights, the timed step, and the proof that a rival's own code ran: for all rivals."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RANK, ALPHA = 16, 32
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("gate_proj", "up_proj", "down_proj")
EXPERT_PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
SIZES: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1e6,
    "use_cache": False,
}
"""Mixtral 8x7B's own."""


@dataclass(frozen=True)
class Ready:
    """A rival's model with its adapters, in training mode.

    proof: returns the name of the code that computes the experts, or raises RuntimeError if it is not the rival's own.
    """

    model: Any
    proof: Callable[[], str]


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def mixtral_config(layers: int) -> Any:
    """Return Mixtral 8x7B's configuration with this many layers."""
    from transformers import MixtralConfig

    return MixtralConfig(num_hidden_layers=layers, architectures=["MixtralForCausalLM"], **SIZES)


def random_model(kind: Any, config: Any, **words: Any) -> Any:
    """Return a model of random bf16 weights that is created where it will run."""
    import torch

    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device()):
            return kind._from_config(config, **words)
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def random_weights() -> Iterator[None]:
    """While this lasts, `from_pretrained` of every model makes random weights of its configuration up.

    A rival's loader then does all that it does to a model, and nobody writes and reads 93 GB.
    """
    from unittest.mock import patch

    from transformers import PreTrainedModel

    def made_up(kind: Any, *_: object, config: Any, **words: Any) -> Any:
        attention = words.get("attn_implementation") or "sdpa"
        return random_model(kind, config, attn_implementation=attention).eval()

    with patch.object(PreTrainedModel, "from_pretrained", classmethod(made_up)):
        yield


def write_folder(folder: Path, layers: int) -> None:
    """Write what a rival's loader reads beside weights: the configuration, and a tokenizer of as many tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    mixtral_config(layers).save_pretrained(folder)
    special = ("<unk>", "<s>", "</s>", "<pad>")
    names = [*special, *(f"token{index}" for index in range(SIZES["vocab_size"] - len(special)))]
    vocabulary = {name: index for index, name in enumerate(names)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    ).save_pretrained(folder)


def expected_parameters(layers: int, *, attention_only: bool) -> int:
    """Return how many parameters adapters of rank 16 have on q, k, v, o and on each expert's three matrices.

    This kit's have 131,072 fewer per layer: queries, keys and values share their first factor.
    """
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    keys = hidden // SIZES["num_attention_heads"] * SIZES["num_key_value_heads"]
    attention = 2 * (hidden + hidden) + 2 * (hidden + keys)
    experts = SIZES["num_local_experts"] * ((hidden + 2 * inner) + (inner + hidden))
    return layers * RANK * (attention + (0 if attention_only else experts))


def check_gradients(model: Any, *, attention_only: bool) -> int:
    """Return the number of expert adapters' parameters, all with gradients that are not zero.

    Raises RuntimeError if one has none, or if a parameter that is not trained has one. Call it between the backward
    pass and the optimizer's step, in a step after the first: in the first one the second factors are zero.
    """
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    silent = [name for name, each in trained.items() if each.grad is None or not bool(each.grad.any())]
    if silent:
        raise RuntimeError(f"{len(silent)} adapters have no gradient, such as {silent[0]}")
    if given := [name for name, each in model.named_parameters() if not each.requires_grad and each.grad is not None]:
        raise RuntimeError(f"{len(given)} frozen weights have a gradient, such as {given[0]}")
    experts = [name for name in trained if ".experts." in name]
    if not experts and not attention_only:
        raise RuntimeError("the experts have no adapters")
    return len(experts)


class Steps:
    """Steps of training on random tokens: bf16 autocast, one micro batch, clipping, AdamW over the adapters."""

    def __init__(self, ready: Ready) -> None:
        import torch

        self.model = ready.model
        self.adapters = [each for each in ready.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(self.adapters, lr=1e-4, fused=True)

    def step(self, seq: int, micro: int, check: Callable[[], object] = lambda: None) -> float:
        import torch

        tokens = torch.randint(0, SIZES["vocab_size"], (micro, seq), device=device())
        with torch.autocast(device(), torch.bfloat16):
            loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        check()
        torch.nn.utils.clip_grad_norm_(self.adapters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def prove(ready: Ready, steps: Steps, seq: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Take two steps and return what they show: the code of the experts, the trained parameters and the loss."""
    experts = 0

    def look() -> None:
        nonlocal experts
        experts = check_gradients(ready.model, attention_only=arguments.attention_only)

    steps.step(seq, 1)
    loss = steps.step(seq, 1, look)
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss is {loss}")
    trained = sum(each.numel() for each in steps.adapters)
    expected = expected_parameters(arguments.layers, attention_only=arguments.attention_only)
    if trained != expected:
        raise RuntimeError(f"expected {expected:,} trained parameters; found {trained:,}")
    return {"experts": ready.proof(), "expert_adapters": experts, "trained": trained, "loss": round(loss, 3)}


def peak_gib() -> float:
    import torch

    return torch.cuda.max_memory_reserved() / 1024**3 if torch.cuda.is_available() else float("nan")


def measured(ready: Ready, seq: int, micro: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return tokens a second, the peak of memory and what proves that the rival's own code ran."""
    from benchmarks.lora import timed_steps

    steps = Steps(ready)
    proof = prove(ready, steps, seq, arguments)
    seconds = timed_steps(lambda: steps.step(seq, micro), 2, max(arguments.steps // 2, 3), in_a_row=True)
    return {"tok_s": seq * micro / seconds, "peak_gib": peak_gib(), **proof}

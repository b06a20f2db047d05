"""Effect of a frozen base in 8 or 4 bit on the loss of fine-tuning, on a base that was trained before.

    python -m benchmarks.base_loss [--base-steps 600] [--steps 200] [--bases fp8,nf4] [--device cuda|cpu] [--tiny]

On random weights rounding is noise among noise. Here a small Mixtral of full-size kernels' widths is first trained, all
weights, on text that every machine has: the sources of Python's standard library, as bytes. Then adapters are trained
on other text (the kit's own pairs, and sources kept back), once for each precision of the base: same weights, adapters'
start, order and settings, those that `finetune` has by default. With fp8+attention, attention and the output layer are
in fp8, too. The last line printed is one JSON object.

    mean, max    of |loss - bf16's| / bf16's over all steps
    last         of the mean of the last 20 losses, with its sign
    first_again  the first batch's loss once more after the last step
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.config.verbs.training import BASE_PRECISIONS, FinetuneConfig
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.model.mixtral import MixtralModel, ModelSettings, build_model
from mixtral_run.model.parallel.mesh import Mesh, open_mesh
from mixtral_run.train.data.samples import GlobalBatch, Row, ShuffledOrder, batches
from mixtral_run.train.lr_schedule import learning_rate
from mixtral_run.train.steps.cuda_graph import backward_of
from mixtral_run.train.steps.step import optimizer_step, trainable
from mixtral_run.trial.sizes import INSTRUCTIONS

BASES = (*BASE_PRECISIONS, "fp8+attention")
"""Forms of the base: values of --base-precision, and the two of --base-precision and --attention-precision."""

KEPT_BACK = 20
"""One of so many files of the standard library is kept for fine-tuning."""

LAST = 20
"""Steps at the end whose mean is compared."""

SMALL = MixtralArchitecture(
    num_layers=8,
    hidden_size=1024,
    ffn_hidden_size=2816,
    num_attention_heads=16,
    num_query_groups=8,
    kv_channels=64,
    num_experts=8,
    moe_router_topk=2,
    vocab_size=256,
    max_position_embeddings=4096,
    rotary_base=10_000.0,
    layernorm_epsilon=1e-5,
)
TINY = dataclasses.replace(
    SMALL, num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, kv_channels=16
)


class ByteSamples:
    """A text's bytes as tokens, cut into samples that all count whole; shuffled anew each epoch."""

    def __init__(self, text: bytes, seq_length: int) -> None:
        self._seq_length = seq_length
        # A sample's last label is the byte after its last token.
        count = (len(text) - 1) // seq_length
        self._tokens = np.frombuffer(text, dtype=np.uint8)[: count * seq_length + 1].astype(np.int64)
        self._order = ShuffledOrder(count)

    @property
    def seq_length(self) -> int:
        return self._seq_length

    def describe(self) -> str:
        return f"{len(self._tokens):,} bytes"

    def index_of(self, position: int, seed: int) -> int:
        return self._order.index_of(position, seed)

    def row(self, index: int) -> Row:
        piece = self._tokens[index * self._seq_length : (index + 1) * self._seq_length + 1]
        return Row(piece[:-1], piece[1:], np.ones(self._seq_length, dtype=np.float32))

    def num_loss_tokens(self, index: int) -> int:  # the same for all
        return self._seq_length


def texts() -> tuple[bytes, bytes]:
    """Training data of the base and of the adapters."""
    root = Path(sysconfig.get_path("stdlib"))
    others = {"site-packages", "dist-packages", "test", "tests"}
    files = [path for path in sorted(root.rglob("*.py")) if others.isdisjoint(path.relative_to(root).parts)]
    validation_set = files[::KEPT_BACK]
    learnt = b"".join(path.read_bytes() for path in sorted(set(files) - set(validation_set)))
    return learnt, INSTRUCTIONS.read_bytes() + b"".join(path.read_bytes() for path in validation_set)


def configs(arguments: argparse.Namespace) -> tuple[PretrainConfig, FinetuneConfig]:
    """Settings of the training of the base and of the adapters. Nothing is loaded from disk or saved to it."""
    nowhere = Path("nowhere")
    common: dict[str, Any] = {
        "load": nowhere,
        "tensor_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "device": arguments.device,
        "seq_length": 64 if arguments.tiny else 512,
    }
    size = 4 if arguments.tiny else 32
    base = PretrainConfig(
        **common,
        micro_batch_size=size,
        global_batch_size=size,
        train_iters=arguments.base_steps,
        lr=3e-3 if arguments.tiny else 6e-4,
        min_lr=6e-5,
        lr_warmup_iters=arguments.base_steps // 12,
        clip_grad=1.0,
    )
    size = 4 if arguments.tiny else 8
    lora = FinetuneConfig(
        **common, save=nowhere, micro_batch_size=size, global_batch_size=size, train_iters=arguments.steps
    )
    return base, lora


def train_base(
    config: PretrainConfig, architecture: MixtralArchitecture, mesh: Mesh, text: bytes
) -> tuple[dict[str, Tensor], list[float]]:
    """A base's weights by their names in the model, and its losses."""
    model = build_model(architecture, ModelSettings(dtype_on(mesh), True), mesh).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.02)
    # In bf16 a second moment that loses a thousandth a step loses nothing: it is rounded back.
    optimizer = torch.optim.AdamW(
        trainable(model), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.95), fused=True
    )
    # Not recorded: at this many tokens a step the GPU is what takes the time.
    step = optimizer_step(model, optimizer, config.max_norm)
    losses = [
        step(batch, learning_rate(config, iteration)).loss
        for iteration, batch in enumerate(chosen_batches(config, text))
    ]
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, losses


def tune(
    config: FinetuneConfig,
    architecture: MixtralArchitecture,
    mesh: Mesh,
    weights: dict[str, Tensor],
    chosen: Sequence[GlobalBatch],
) -> tuple[list[float], float]:
    """Losses of adapters on these weights at the config's base precision, and the first batch's after training."""
    model = build_on(config, architecture, mesh, weights)
    optimizer = torch.optim.AdamW(
        trainable(model), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.999), fused=True
    )
    with backward_of(model, config.micro_batch_size * config.seq_length) as backward:
        step = optimizer_step(model, optimizer, config.max_norm, backward)
        losses = [step(batch, learning_rate(config, iteration)).loss for iteration, batch in enumerate(chosen)]
    (first,) = chosen[0].micro_batches
    with torch.no_grad():
        again = model.losses(first.tokens.to(mesh.device), first.labels.to(mesh.device)).mean().item()
    return losses, again


def build_on(
    config: FinetuneConfig, architecture: MixtralArchitecture, mesh: Mesh, weights: dict[str, Tensor]
) -> MixtralModel:
    """The model on these weights with adapters at their start, in training mode."""
    lora = LoraSettings.from_config(config)
    attention = config.attention_precision
    settings = ModelSettings(dtype_on(mesh), True, lora, "none", config.base_precision, attention_precision=attention)
    model = build_model(architecture, settings, mesh).train()
    missing = set(weights)

    def fill() -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in weights and not parameter.is_meta:
                    parameter.copy_(weights[name])
                    missing.discard(name)

    fill()
    model.quantize_attention()
    model.quantize_experts(fill)
    assert not missing, f"weights without a place in the model: {sorted(missing)}"
    return model


def chosen_batches(config: PretrainConfig | FinetuneConfig, text: bytes) -> list[GlobalBatch]:
    """All batches of a run."""
    assert config.global_batch_size is not None
    stream = batches(
        ByteSamples(text, config.seq_length),
        seed=config.seed,
        micro_batch_size=config.micro_batch_size,
        global_batch_size=config.global_batch_size,
    )
    return [next(stream) for _ in range(config.train_iters)]


def dtype_on(mesh: Mesh) -> torch.dtype:
    return torch.bfloat16 if mesh.device.type == "cuda" else torch.float32


def compared(losses: Sequence[float], with_: Sequence[float]) -> dict[str, float]:
    """Return the relative difference of losses from those of the same steps of another run."""
    apart = [abs(one - other) / other for one, other in zip(losses, with_, strict=True)]
    last, other_last = (sum(each[-LAST:]) for each in (losses, with_))
    return {"mean": sum(apart) / len(apart), "max": max(apart), "last": last / other_last - 1}


def shown_steps(count: int) -> list[int]:
    """Counted from 1: the ends of a run's quarter and half, its first and last step."""
    return sorted({1, max(count // 4, 1), max(count // 2, 1), count})


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    learnt, other = texts()
    base_config, lora_config = configs(arguments)
    architecture = TINY if arguments.tiny else SMALL
    with open_mesh(base_config) as mesh:
        started = time.perf_counter()
        weights, base_losses = train_base(base_config, architecture, mesh, learnt)
        seconds = time.perf_counter() - started
        print(
            f"base: {architecture.num_parameters:,} parameters, {len(learnt):,} bytes of text; loss of "
            f"{len(base_losses)} steps {base_losses[0]:.4f} → {base_losses[-1]:.4f} in {seconds:.0f} s",
            flush=True,
        )
        chosen = chosen_batches(lora_config, other)
        bf16: list[float] = []
        found: dict[str, dict[str, Any]] = {}
        for name in ("bf16", *(each for each in arguments.bases if each != "bf16")):
            # Graphs and their memory go with the run before.
            gc.collect()
            started = time.perf_counter()
            precision, _, attention = name.partition("+")
            config = dataclasses.replace(
                lora_config, base_precision=precision, attention_precision="fp8" if attention else "bf16"
            )
            losses, again = tune(config, architecture, mesh, weights, chosen)
            bf16 = bf16 or losses
            at = {str(step): losses[step - 1] for step in shown_steps(len(losses))}
            found[name] = {"losses": at, "first_again": again, **compared(losses, bf16)}
            print_run(name, found[name], time.perf_counter() - started)
    return {
        "parameters": architecture.num_parameters,
        "base": {"steps": len(base_losses), "first": base_losses[0], "last": base_losses[-1], "seconds": seconds},
        "lora": found,
    }


def print_run(precision: str, run: dict[str, Any], seconds: float) -> None:
    losses = "  ".join(f"{step}: {loss:.4f}" for step, loss in run["losses"].items())
    print(
        f"{precision:>13}  {losses}  first again {run['first_again']:.4f}  from bf16: mean {run['mean']:.3%}, "
        f"max {run['max']:.3%}, last {run['last']:+.3%}  ({seconds:.0f} s)",
        flush=True,
    )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-steps", type=int, help="of the base's training; default 600, tiny 60")
    parser.add_argument("--steps", type=int, help="of each fine-tuning; default 200, tiny 20")
    parser.add_argument(
        "--bases", default=",".join(BASES), help="forms of the base that are compared with bf16, separated by commas"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a toy model, to see that all of it runs")
    arguments = parser.parse_args(words)
    arguments.bases = arguments.bases.split(",")
    if unknown := sorted({*arguments.bases} - {*BASES}):
        parser.error(f"--bases: expected some of {','.join(BASES)}; found {','.join(unknown)}")
    arguments.base_steps = arguments.base_steps or (60 if arguments.tiny else 600)
    arguments.steps = arguments.steps or (20 if arguments.tiny else 200)
    print(json.dumps(measure(arguments)))


if __name__ == "__main__":
    main()

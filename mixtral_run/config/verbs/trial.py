"""Settings of `smoke` and `rehearse`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mixtral_run.config.fields import DATA, LAYOUT, MEMORY, OUTPUT, PROCESSES, Config, setting
from mixtral_run.config.launch import LaunchConfig


@dataclass(frozen=True, kw_only=True)
class SmokeConfig(LaunchConfig):
    """Test of conversion, training, fine-tuning and generation on this machine."""

    hf_model_path: str | None = setting(
        None, help="HF model to convert if --load holds no checkpoint yet.", section=LAYOUT
    )
    random_layers: int | None = setting(
        None,
        help="Create a random Mixtral of full width with this many layers instead. Nothing is downloaded.",
        minimum=1,
        section=LAYOUT,
    )
    load: Path = setting(
        Path("smoke/checkpoint"), help="Converted checkpoint; created if it is missing.", section=LAYOUT
    )
    work_path: Path = setting(
        Path("smoke"),
        help="Folder for the adapter and the report. Those of an earlier smoke test are replaced.",
        section=OUTPUT,
    )
    seq_length: int = setting(512, help="Tokens per sample.", minimum=2, section=DATA)
    micro_batch_size: int = setting(1, help="Samples per process and forward pass.", minimum=1, section=DATA)
    global_batch_size: int = setting(8, help="Samples per iteration.", minimum=1, section=DATA)
    train_iters: int = setting(10, help="Iterations of each training.", minimum=1, section=DATA)
    recompute_activations: bool = setting(
        True, help="Recompute all activations of a layer in the backward pass.", section=MEMORY
    )
    json: bool = setting(False, help="Print the report as JSON.", section=OUTPUT)


@dataclass(frozen=True, kw_only=True)
class RehearseConfig(Config):
    """The whole job at small size."""

    work_path: Path = setting(
        Path("rehearsal"), help="Folder for all files. That of an earlier rehearsal is replaced.", section=OUTPUT
    )
    device: str = setting(
        "auto",
        help="Device to run on. auto takes the GPUs if there are any.",
        choices=("auto", "cuda", "cpu"),
        section=PROCESSES,
    )
    seed: int = setting(1234, help="Random seed of the model and of training.", minimum=0, section=PROCESSES)
    host: bool = setting(
        False, help="Provision a throw-away host over SSH and rehearse in its container instead.", section="Hosts"
    )
    json: bool = setting(False, help="Print the report as JSON.", section=OUTPUT)

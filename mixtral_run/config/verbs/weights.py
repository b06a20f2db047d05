"""Settings of `convert`, `verify` and `export`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mixtral_run.config.fields import COMPARISON, LAYOUT, OUTPUT, PROCESSES, Config, setting
from mixtral_run.config.launch import CONVERTED_LAYOUT, LaunchConfig, ParallelConfig
from mixtral_run.config.lora import adapter_problems
from mixtral_run.config.names.hub_names import may_be_hub_name


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(ParallelConfig):
    """Conversion of HF weights to Megatron torch_dist, and back."""

    tensor_model_parallel_size: int = setting(
        CONVERTED_LAYOUT[0], help="TP of the checkpoint. It loads in every other layout.", minimum=1, section=LAYOUT
    )
    expert_model_parallel_size: int = setting(
        CONVERTED_LAYOUT[1], help="EP of the checkpoint. It loads in every other layout.", minimum=1, section=LAYOUT
    )
    hf_model_path: str | None = setting(
        None,
        help="HF model to convert: its directory, or its name on the hub (NAME@REVISION for a revision other than "
        "main). With --from-megatron: the source of config.json and the tokenizer, which a checkpoint that "
        "Megatron-LM saved lacks.",
        section=LAYOUT,
        store="input",
    )
    from_megatron: Path | None = setting(
        None,
        help="Checkpoint to convert back to an HF model, in any layout. Checkpoints that Megatron-LM or "
        "Megatron-Bridge trained and saved work as well.",
        section=LAYOUT,
        store="input",
    )
    adapter: tuple[str, ...] = setting(
        (),
        help="With --from-megatron: adapter of that checkpoint to merge into the HF model, as for `export`.",
        section=LAYOUT,
        store="input",
    )
    output_path: Path = setting(
        help="Folder to write, or its URL, such as s3://bucket/folder; must be empty or new.",
        section=OUTPUT,
        store="output",
    )
    workers: int | None = setting(
        None,
        help="Threads that copy. Default: the number that the first seconds show to be fastest.",
        minimum=1,
        section=PROCESSES,
    )
    overwrite: bool = setting(False, help="Replace an earlier conversion in the output folder.", section=OUTPUT)

    def problems(self) -> list[str]:
        found = super().problems()
        if self.hf_model_path is None and self.from_megatron is None:
            found.append("--hf-model-path is required, or --from-megatron in its place; found neither")
        if self.hf_model_path == "":
            found.append("--hf-model-path: expected a directory, or a name on the hub; found ''")
        if self.adapter and self.from_megatron is None:
            found.append("--adapter: expected --from-megatron CHECKPOINT with it; found none")
        found += adapter_problems(self.adapter)
        return found


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(LaunchConfig):
    """Description of a checkpoint, and its comparison with the HF model that it was made from."""

    tensor_model_parallel_size: int = setting(1, help="TP of the logits comparison.", minimum=1, section=COMPARISON)
    expert_model_parallel_size: int = setting(1, help="EP of the logits comparison.", minimum=1, section=COMPARISON)
    nproc_per_node: int | None = setting(
        1, help="Processes of the logits comparison on this machine.", minimum=1, section=PROCESSES
    )
    dtype: str = setting(
        "fp32", help="Precision of the logits comparison.", choices=("auto", "bf16", "fp32"), section=COMPARISON
    )
    load: Path = setting(
        help="torch_dist checkpoint, adapter, or HF model (its directory, or its name on the hub); or its URL.",
        section=LAYOUT,
        store="input",
    )
    against: Path | None = setting(
        None,
        help="HF model to compare every tensor with, bit by bit: its directory, or its name on the hub.",
        section=COMPARISON,
        store="input",
    )
    logits: bool = setting(
        True,
        help="With --against: also compare the logits with those of the HF model, if both models fit into memory.",
        section=COMPARISON,
    )
    adapter: Path | None = setting(
        None, help="Adapter on the checkpoint for the logits comparison. Needs --peft-path.", section=COMPARISON
    )
    peft_path: Path | None = setting(
        None,
        help="PEFT directory of the same adapter on the HF model for the logits comparison. Needs --adapter.",
        section=COMPARISON,
    )
    logits_tolerance: float = setting(
        1e-3, help="Largest difference of two logits that counts as equal.", above=0, section=COMPARISON
    )
    logits_file: Path | None = setting(
        None, help="JSON file to write the logits comparison to as well.", section=OUTPUT
    )
    proof: bool = setting(
        False, help="Read every byte and check it against the checksums that were saved with it.", section=COMPARISON
    )
    json: bool = setting(False, help="Print the report as JSON.", section=OUTPUT)

    def problems(self) -> list[str]:
        found = super().problems()
        if (self.adapter is None) != (self.peft_path is None):
            found.append("--adapter and --peft-path: expected both or neither; found one")
        if self.adapter is not None and self.against is None:
            found.append("--adapter: expected --against HF_DIR with it; found none")
        return found


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """Export of an adapter as a PEFT directory, or merged into an HF model."""

    adapter: tuple[str, ...] = setting(
        help="Adapter checkpoint that finetune saved, as PATH[:WEIGHT]. Several make one adapter that adds up as they "
        "do: A:0.7 and B:0.3 give 0.7 times A plus 0.3 times B, exactly, with the sum of their ranks.",
        section=LAYOUT,
        store="input",
    )
    hf_model_path: Path | None = setting(
        None,
        help="HF model of the base: its directory, or its name on the hub. --merge needs it.",
        section=LAYOUT,
        store="input",
    )
    output_path: Path = setting(
        help="Folder to write, or its URL, such as s3://bucket/folder; must be empty or new.",
        section=OUTPUT,
        store="output",
    )
    format: str = setting(
        "peft",
        help="peft: for PEFT; one pair of matrices per expert, which PEFT converts when it loads them. peft-fused: for "
        "PEFT only; its own stacked form, which vLLM reads wrongly. vllm: for vLLM, SGLang and `serve`; all three "
        "matrices of every expert.",
        choices=("peft", "peft-fused", "vllm"),
        section=OUTPUT,
    )
    merge: bool = setting(
        False, help="Write a full HF model with the adapter merged in, streamed, for every program.", section=OUTPUT
    )
    overwrite: bool = setting(False, help="Replace an earlier export in the output folder.", section=OUTPUT)
    push: str | None = setting(
        None,
        help="OWNER/NAME on the hub to upload the export to. The repository is made if there is none, and private.",
        section=OUTPUT,
    )
    push_public: bool = setting(False, help="With --push: everybody may see the repository.", section=OUTPUT)
    hf_token_file: Path | None = setting(
        None, help="With --push: file that holds the token. Default: this user's login.", section=OUTPUT
    )

    def problems(self) -> list[str]:
        found = super().problems()
        found += adapter_problems(self.adapter)
        if self.merge and self.hf_model_path is None:
            found.append("--hf-model-path is required: --merge needs the HF model of the adapter's base")
        if self.push is not None and not may_be_hub_name(self.push):
            found.append(f"--push: expected OWNER/NAME; found {self.push!r}")
        if self.push is None and (self.push_public or self.hf_token_file is not None):
            found.append("--push-public and --hf-token-file: expected --push NAME with them; found none")
        return found

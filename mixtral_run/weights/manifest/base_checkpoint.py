"""A base checkpoint that becomes an HF model: written by `convert`, or saved by Megatron-LM or Megatron-Bridge since.

Checkpoints of those programs have optimizer and other state next to the weights, other chunks, and none of the kit's
files unless they were saved into the folder of the conversion. They are accepted if all weights of the model are there.
"""

from __future__ import annotations

from pathlib import Path

from mixtral_run.errors import WeightsError, shortened
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.terminal.report import Report
from mixtral_run.weights.hf.hub import resolve_description
from mixtral_run.weights.manifest.checkpoint_folder import (
    CONVERTED_ITERATION,
    Checkpoint,
    iteration_folder_of,
    iteration_of,
    open_checkpoint,
)
from mixtral_run.weights.manifest.folder_kind import BASE, refuse_other_kinds
from mixtral_run.weights.manifest.manifest import MANIFEST_NAME, UNKNOWN_FINGERPRINT, BaseManifest
from mixtral_run.weights.manifest.proof import PROOF_NAME
from mixtral_run.weights.mapping import hf_to_megatron
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader

_MODEL_PREFIXES = ("embedding.", "encoder.", "decoder.", "output_layer.", "mtp.")


def is_of_model(key: str) -> bool:
    """Return True for the key of a tensor of the model, adapters included; False for optimizer and random state."""
    return key.startswith(_MODEL_PREFIXES)


def open_base(path: Path, hf_model_path: str | None, report: Report) -> tuple[Checkpoint, Path]:
    """Return the checkpoint, and the folder with config.json and the tokenizer.

    Without a mixtral_run.json the architecture is that of the HF model's config.json. Raises WeightsError.
    """
    refuse_other_kinds("--from-megatron", path, BASE)
    described = None if hf_model_path is None else resolve_description(hf_model_path, report)
    architecture = None if described is None else MixtralArchitecture.from_hf_directory(described)
    iteration_folder = iteration_folder_of(path)
    folder = path.parent if iteration_folder == path else path
    if any((each / MANIFEST_NAME).is_file() for each in (folder, iteration_folder)):
        checkpoint = open_checkpoint(path)
        if architecture is not None and architecture != checkpoint.architecture:
            raise WeightsError(
                "The HF model is not the one that was converted.",
                where=str(described),
                expected=str(checkpoint.architecture.to_mapping()),
                found=str(architecture.to_mapping()),
            )
    elif architecture is not None:
        manifest = BaseManifest(
            values={"kind": "base", "architecture": architecture.to_mapping()},
            architecture=architecture,
            dtype="",
            fingerprint=UNKNOWN_FINGERPRINT,
        )
        checkpoint = Checkpoint(folder, iteration_of(iteration_folder), iteration_folder, manifest)
    else:
        raise WeightsError(
            "The checkpoint does not name its model.",
            where=str(folder),
            expected=f"{MANIFEST_NAME}, as mixtral-run convert writes; Megatron-LM and Megatron-Bridge do not",
            next_command="the same with --hf-model-path HF_DIR, to take config.json and the tokenizer from",
        )
    tokenizer = described or folder / "tokenizer"
    if not (tokenizer / "config.json").is_file():
        raise WeightsError(
            "The HF model's config.json is missing.",
            where=str(tokenizer),
            expected="config.json and the tokenizer's files",
            next_command="the same with --hf-model-path HF_DIR, to take them from",
        )
    return checkpoint, tokenizer


def is_as_converted(checkpoint: Checkpoint) -> bool:
    """Return True for the iteration that `convert` wrote; its weights must have the recorded fingerprint."""
    return checkpoint.iteration == CONVERTED_ITERATION and (checkpoint.folder / PROOF_NAME).is_file()


def check_base(checkpoint: Checkpoint, reader: Reader, report: Report) -> None:
    """Raise WeightsError unless all weights of the model are there, and no others that an HF model cannot hold.

    Afterwards every tensor of the reader has the key that `convert` gives it.
    """
    if checkpoint.kind != "base":
        raise WeightsError(
            "This is not a base checkpoint.",
            where=str(checkpoint.folder),
            expected="what mixtral-run convert wrote; for an adapter: --adapter in addition to its base",
            found=f"a checkpoint of kind {checkpoint.kind}",
        )
    if (
        hf_to_megatron.LOCAL_PRE_MLP_LAYERNORM_KEY in reader.tensors
        and hf_to_megatron.PRE_MLP_LAYERNORM_KEY not in reader.tensors
    ):
        reader.rename(hf_to_megatron.LOCAL_PRE_MLP_LAYERNORM_KEY, hf_to_megatron.PRE_MLP_LAYERNORM_KEY)
    expected = hf_to_megatron.megatron_tensors(checkpoint.architecture)
    found = {key: info.shape for key, info in reader.tensors.items()}
    wrong = []
    for key, shape in expected.items():
        stored = found.get(key, ())
        if key in hf_to_megatron.VOCABULARY_KEYS and stored[:1] > shape[:1] and stored[1:] == shape[1:]:
            report.say(f"  {key}: {found[key][0] - shape[0]:,} rows of padding are left out")
        elif found.get(key) != shape:
            wrong.append(
                f"{key}: expected shape {list(shape)}; found {list(found[key]) if key in found else 'nothing'}"
            )
    wrong += [f"{key}: a Mixtral model has no such weights" for key in found if key not in expected]
    if wrong:
        raise WeightsError(
            "The checkpoint does not hold the weights of this model.",
            where=str(checkpoint.iteration_folder),
            problems=shortened(wrong),
        )

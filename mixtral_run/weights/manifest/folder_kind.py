"""What a folder holds: a base, an adapter, an HF model or a PEFT adapter. Standard library only.

The readers of checkpoints report what is missing in a folder. A folder of another kind is not damaged, so that a
message about missing files would mislead; here it is named, with the flag that takes it.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from mixtral_run.errors import WeightsError
from mixtral_run.weights.hf.hf_weights import is_hf_directory
from mixtral_run.weights.manifest.manifest import MANIFEST_NAME, is_kind

PEFT_CONFIG = "adapter_config.json"
_LATEST = "latest_checkpointed_iteration.txt"

BASE, ADAPTER, HF_MODEL, PEFT = "a base checkpoint", "an adapter checkpoint", "an HF model", "a PEFT adapter"

_WRITTEN_BY_FINETUNE = "the folder that mixtral-run finetune --save FOLDER wrote"
_NEXT = {
    "--load": {
        ADAPTER: "--load BASE, the base that it was trained on; generate takes the adapter as --adapter {folder}, "
        "finetune continues it with --save {folder} --resume",
        PEFT: "--load BASE, the model that it was trained on; generate takes the adapter as --adapter {folder}, "
        "finetune continues it with --init-adapter {folder}",
    },
    "--adapter": {
        BASE: "--load {folder}; --adapter takes " + _WRITTEN_BY_FINETUNE,
        HF_MODEL: "--load {folder}; --adapter takes " + _WRITTEN_BY_FINETUNE,
        PEFT: _WRITTEN_BY_FINETUNE + "; finetune --init-adapter {folder} makes one from it",
    },
    "--save": {
        ADAPTER: "pretrain with another --save; finetune --save {folder} --resume continues the adapter",
        HF_MODEL: "another --save",
        PEFT: "another --save",
    },
    "--hf-model-path": {
        ADAPTER: "the HF model of its base; mixtral-run export --adapter {folder} writes HF files",
        PEFT: "the HF model that base_model_name_or_path in its adapter_config.json names",
        BASE: "the HF model that it was converted from; or --from-megatron {folder} to convert it back",
    },
    "--against": {
        ADAPTER: "the HF model of its base",
        PEFT: "the HF model; --peft-path takes a PEFT adapter",
        BASE: "the HF model that it was converted from",
    },
    "--from-megatron": {
        ADAPTER: "--from-megatron BASE --adapter {folder}: the base that it was trained on",
        PEFT: "--from-megatron BASE: the base that it was trained on",
        HF_MODEL: "--hf-model-path {folder}: it is an HF model already",
    },
}
"""What to give instead, by flag and by the kind of its value."""


def kind_of(folder: Path) -> str | None:
    """Return BASE, ADAPTER, HF_MODEL or PEFT for a folder that shows it; None for any other, or one that is missing."""
    try:
        if (folder / PEFT_CONFIG).is_file() and not (folder / "config.json").is_file():
            return PEFT
        if (folder / _LATEST).is_file():
            if (folder / MANIFEST_NAME).is_file():
                return BASE
            return next((_kind_of_iteration(each.parent) for each in folder.glob(f"iter_*/{MANIFEST_NAME}")), None)
        if (folder / ".metadata").is_file():
            return _kind_of_iteration(folder) if (folder / MANIFEST_NAME).is_file() else None
        return HF_MODEL if is_hf_directory(folder) else None
    except OSError:
        return None


def _kind_of_iteration(folder: Path) -> str:
    """Return what an iteration with a manifest of its own is; a damaged one passes for an adapter."""
    return BASE if is_kind(folder, "base") else ADAPTER


def refuse_other_kinds(flag: str, folder: Path, *wanted: str) -> None:
    """Raise WeightsError if `folder`, the value of `flag`, is of a known kind and of none of `wanted`."""
    kind = kind_of(folder)
    if kind is None or kind in wanted:
        return
    advice = _NEXT[flag].get(kind)
    raise WeightsError(
        f"This is {kind}, not {' or '.join(wanted)}.",
        where=f"{flag} {folder}",
        expected=" or ".join(wanted),
        found=kind,
        next_command=advice.format(folder=shlex.quote(str(folder))) if advice else None,
    )

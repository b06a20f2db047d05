"""Open an adapter checkpoint and check its tensors against its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.errors import WeightsError
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.weights.adapter.schema import Place, adapter_tensors, places
from mixtral_run.weights.manifest.checkpoint_folder import Checkpoint, Wanted, adapter_manifest_of, open_checkpoint
from mixtral_run.weights.manifest.folder_kind import ADAPTER, refuse_other_kinds
from mixtral_run.weights.manifest.manifest import AdapterManifest
from mixtral_run.weights.mapping.hf_to_megatron import VOCABULARY_KEYS
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader


@dataclass(frozen=True)
class OpenAdapter:
    """An adapter's newest iteration, its manifest, and the parts of it that change each HF tensor."""

    checkpoint: Checkpoint
    manifest: AdapterManifest
    places: Mapping[str, Place]

    @property
    def lora(self) -> LoraSettings:
        """Return the settings that the adapter was trained with."""
        return self.manifest.lora

    @property
    def base_fingerprint(self) -> str:
        """Return the fingerprint of the base that the adapter was trained on."""
        return self.manifest.base.fingerprint


def open_adapter(path: Path) -> OpenAdapter:
    """Read the manifest. Raises WeightsError if `path` is not a complete adapter checkpoint."""
    refuse_other_kinds("--adapter", path, ADAPTER)
    checkpoint = open_checkpoint(path, Wanted.ADAPTER)
    manifest = adapter_manifest_of(checkpoint)
    return OpenAdapter(checkpoint, manifest, places(manifest.architecture, manifest.lora))


def check_tensors(adapter: OpenAdapter, reader: Reader) -> None:
    """Raise WeightsError unless the checkpoint has every tensor of the adapter, in its shape."""
    expected = adapter_tensors(adapter.checkpoint.architecture, adapter.lora, parts_of_vocabulary(reader))
    problems = [f"{key}: missing" for key in expected if key not in reader.tensors]
    problems += [
        f"{key}: expected shape {list(shape)}; found {list(reader.tensors[key].shape)}"
        for key, shape in expected.items()
        if key in reader.tensors and reader.tensors[key].shape != shape
    ]
    dtypes = {reader.tensors[key].dtype for key in expected if key in reader.tensors}
    if len(dtypes) > 1:
        problems.append(f"dtype: expected one for all tensors; found {', '.join(sorted(dtypes))}")
    if problems:
        where = str(adapter.checkpoint.iteration_folder)
        raise WeightsError("The adapter's tensors do not match its mixtral_run.json.", where=where, problems=problems)


def parts_of_vocabulary(reader: Reader) -> int:
    """Return the TP in which the vocabulary was cut, and by which it was padded; 1 if nothing of it is there."""
    found = [reader.layout_of(key, 0) for key in VOCABULARY_KEYS if key in reader.tensors]
    return max(found, default=1)

"""An adapter checkpoint opened, and checked to hold what its record says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.errors import WeightsError
from mixtral_run.weights.adapter.schema import Lora, Place, adapter_tensors, lora_of, places
from mixtral_run.weights.manifest import record
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader


@dataclass(frozen=True)
class OpenAdapter:
    """An adapter's newest iteration, its settings, and what it changes by HF tensor."""

    checkpoint: record.Checkpoint
    lora: Lora
    places: Mapping[str, Place]

    @property
    def base_fingerprint(self) -> str:
        return str(self.checkpoint.record.get("base", {}).get("fingerprint"))


def open_adapter(path: Path) -> OpenAdapter:
    """Read the record. Raises WeightsError when `path` is no whole adapter checkpoint."""
    checkpoint = record.open_checkpoint(path)
    if checkpoint.kind != "adapter":
        raise WeightsError(
            "This is not an adapter.",
            where=str(path),
            expected="what mixtral-run finetune saved",
            found=f"a checkpoint of kind {checkpoint.kind}",
            next_command="mixtral-run finetune … --save FOLDER, and that folder",
        )
    lora = lora_of(checkpoint.record, str(checkpoint.iteration_folder))
    return OpenAdapter(checkpoint, lora, places(checkpoint.architecture, lora))


def check_tensors(adapter: OpenAdapter, reader: Reader) -> None:
    """Raise WeightsError unless every tensor that the record promises is there, in its shape."""
    expected = adapter_tensors(adapter.checkpoint.architecture, adapter.lora)
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
        raise WeightsError("The adapter's tensors are not what its record says.", where=where, problems=problems)

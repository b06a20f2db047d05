"""Read LoRA's A and B of single HF tensors from an adapter checkpoint, on demand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.weights.adapter.schema import Place, linear_in_key, linear_out_key
from mixtral_run.weights.torch_dist.checkpoint_reader import Bits, Reader

_INTEGERS = {2: torch.int16, 4: torch.int32}


def as_tensor(bits: Bits, dtype: str) -> torch.Tensor:
    """Return bits as a tensor of this dtype; it shares their memory."""
    signed = bits.view(f"i{bits.itemsize}")
    return torch.from_numpy(signed).view(getattr(torch, dtype))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes; they share its memory if it is contiguous."""
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()]).numpy().data.cast("B")


class Factors:
    """A and B by HF tensor, in the dtype in which they were saved. q, k and v share one A, and so do w1 and w3."""

    def __init__(self, reader: Reader, lora: LoraSettings, places: Mapping[str, Place]) -> None:
        self._reader = reader
        self.lora = lora
        self.places = places

    def dtype(self, module: str) -> tuple[str, int]:
        """Return dtype and bytes per element of a module's factors."""
        info = self._reader.tensors[linear_in_key(module)]
        return info.dtype, info.item_size

    def a(self, name: str) -> torch.Tensor:
        """Return A, [r, in]."""
        place = self.places[name]
        return as_tensor(self._reader.matrix(linear_in_key(place.module), place.leading), self.dtype(place.module)[0])

    def b(self, name: str) -> torch.Tensor:
        """Return the rows of B that belong to this tensor, [out, r]."""
        place = self.places[name]
        key = linear_out_key(place.module)
        parts = [self._reader.rows(key, place.leading, start, stop) for start, stop in place.rows]
        return as_tensor(np.concatenate(parts), self._reader.tensors[key].dtype)

    def stacked_a(self, module: str, layer: int) -> torch.Tensor:
        """Return A of all experts of a layer, stacked expert by expert, [experts · r, in]."""
        key = linear_in_key(module)
        experts = range(self._reader.tensors[key].shape[1])
        parts = [self._reader.matrix(key, (layer, expert)) for expert in experts]
        return as_tensor(np.concatenate(parts), self.dtype(module)[0])

    def stacked_b(self, module: str, layer: int) -> torch.Tensor:
        """Return B of all experts of a layer, with the experts' columns interleaved by rank, [out, r · experts]."""
        key = linear_out_key(module)
        experts = range(self._reader.tensors[key].shape[1])
        parts = [self._reader.matrix(key, (layer, expert)) for expert in experts]
        stacked = np.stack(parts, axis=-1)
        return as_tensor(stacked.reshape(stacked.shape[0], -1), self.dtype(module)[0])

    def zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a factor that changes nothing."""
        return torch.zeros(shape, dtype=getattr(torch, self.dtype(self.lora.target_modules[0])[0]))

"""LoRA's A and B of single HF tensors, read on demand: of one adapter checkpoint, or of a weighted sum of several."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.weights.adapter.schema import LINEAR_KEYS, Place, linear_in_key, linear_out_key, trained_also
from mixtral_run.weights.mapping.hf_to_megatron import Shape, hf_tensors
from mixtral_run.weights.torch_dist.checkpoint_reader import Bits, Reader

_INTEGERS = {2: torch.int16, 4: torch.int32}
_FLOAT32 = ("float32", 4)


def as_tensor(bits: Bits, dtype: str) -> torch.Tensor:
    """Return bits as a tensor of this dtype; it shares their memory."""
    signed = bits.view(f"i{bits.itemsize}")
    return torch.from_numpy(signed).view(getattr(torch, dtype))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes; they share its memory if it is contiguous."""
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()]).numpy().data.cast("B")


class Factors(ABC):
    """A and B by HF tensor. q, k and v share one A, and so do w1 and w3. places: HF tensor → its part of the adapter.

    A module is a linear layer by Megatron's name; `leading` is its layer, or layer and expert.
    """

    def __init__(self, architecture: MixtralArchitecture, places: Mapping[str, Place]) -> None:
        self.architecture = architecture
        self.places = places

    @property
    @abstractmethod
    def target_modules(self) -> tuple[str, ...]:
        """Return the modules that have factors."""

    @property
    @abstractmethod
    def dtype(self) -> tuple[str, int]:
        """Return dtype and bytes per element of all factors."""

    @abstractmethod
    def rank(self, module: str) -> int:
        """Return the rank of a module's factors."""

    @abstractmethod
    def scale(self, module: str) -> float:
        """Return the factor of B·A of a module."""

    @abstractmethod
    def inner(self, module: str, leading: Shape) -> torch.Tensor:
        """Return A, [r, in]."""

    @abstractmethod
    def outer(self, module: str, leading: Shape, rows: Sequence[tuple[int, int]] | None = None) -> torch.Tensor:
        """Return these rows of B in order, or all of them, [out, r]."""

    @property
    def trained_also(self) -> tuple[str, ...]:
        """Return the HF tensors of the base that were trained with the adapter."""
        return ()

    def trained(self, name: str) -> torch.Tensor:
        """Return one of `trained_also`, in the shape of the HF tensor."""
        raise KeyError(name)

    def a(self, name: str) -> torch.Tensor:
        """Return A of an HF tensor, [r, in]."""
        place = self.places[name]
        return self.inner(place.module, place.leading)

    def b(self, name: str) -> torch.Tensor:
        """Return the rows of B that belong to an HF tensor, [out, r]."""
        place = self.places[name]
        return self.outer(place.module, place.leading, place.rows)

    def stacked_a(self, module: str, layer: int) -> torch.Tensor:
        """Return A of all experts of a layer, stacked expert by expert, [experts · r, in]."""
        return torch.cat([self.inner(module, (layer, each)) for each in range(self.architecture.num_experts)])

    def stacked_b(self, module: str, layer: int) -> torch.Tensor:
        """Return B of all experts of a layer, with the experts' columns interleaved by rank, [out, r · experts]."""
        parts = [self.outer(module, (layer, each)) for each in range(self.architecture.num_experts)]
        return torch.stack(parts, dim=-1).flatten(1)

    def zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a factor that changes nothing."""
        return torch.zeros(shape, dtype=getattr(torch, self.dtype[0]))


class CheckpointFactors(Factors):
    """Factors of an adapter checkpoint, in the dtype in which they were saved. part: see schema.linear_in_key."""

    def __init__(
        self,
        architecture: MixtralArchitecture,
        lora: LoraSettings,
        places: Mapping[str, Place],
        reader: Reader,
        part: str = "linear",
    ) -> None:
        super().__init__(architecture, places)
        self._lora, self._reader, self._part = lora, reader, part
        self._also = trained_also(architecture, lora)
        info = reader.tensors[linear_in_key(lora.target_modules[0])]
        self._dtype = info.dtype, info.item_size

    @property
    def target_modules(self) -> tuple[str, ...]:
        return self._lora.target_modules

    @property
    def dtype(self) -> tuple[str, int]:
        return self._dtype

    def rank(self, module: str) -> int:
        return self._lora.of(module).rank

    def scale(self, module: str) -> float:
        return self._lora.of(module).scale

    def inner(self, module: str, leading: Shape) -> torch.Tensor:
        return as_tensor(self._reader.matrix(linear_in_key(module, self._part), self._stored(leading)), self._dtype[0])

    def outer(self, module: str, leading: Shape, rows: Sequence[tuple[int, int]] | None = None) -> torch.Tensor:
        key, leading = linear_out_key(module, self._part), self._stored(leading)
        if rows is None:
            return as_tensor(self._reader.matrix(key, leading), self._dtype[0])
        parts = [self._reader.rows(key, leading, start, stop) for start, stop in rows]
        return as_tensor(np.concatenate(parts), self._dtype[0])

    def _stored(self, leading: Shape) -> Shape:
        """Return where a matrix is stored: one that experts share has a layer, and no expert."""
        return leading[:1] if self._lora.shared else leading

    @property
    def trained_also(self) -> tuple[str, ...]:
        return tuple(self._also)

    def trained(self, name: str) -> torch.Tensor:
        ranges = self._also[name]
        parts = [self._reader.rows(ranges.key, ranges.leading, start, stop) for start, stop in ranges.rows]
        whole = as_tensor(np.concatenate(parts), self._reader.tensors[ranges.key].dtype)
        return whole.view(hf_tensors(self.architecture)[name])


@dataclass(frozen=True)
class Term:
    """One summand: `weight · scale · B·A`."""

    weight: float
    factors: Factors


class SumOfFactors(Factors):
    """Factors of a weighted sum of adapters, fp32: the ranks are put side by side, so that the sum is exact.

    A module that a summand does not have is zero there, and takes no ranks. Where all scales of a module are equal, the
    sum has this scale; otherwise it has scale 1. What remains of weights and scales is multiplied into B.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        everywhere: dict[str, Place] = {}
        for term in terms:
            everywhere |= term.factors.places
        super().__init__(terms[0].factors.architecture, everywhere)
        self._terms = terms

    @property
    def target_modules(self) -> tuple[str, ...]:
        found = {module for term in self._terms for module in term.factors.target_modules}
        return tuple(module for module in LINEAR_KEYS if module in found)

    @property
    def dtype(self) -> tuple[str, int]:
        return _FLOAT32

    @property
    def trained_also(self) -> tuple[str, ...]:
        # adapter_sum.py refuses to add several adapters that have any.
        return self._terms[0].factors.trained_also

    def trained(self, name: str) -> torch.Tensor:
        return self._terms[0].factors.trained(name)

    def rank(self, module: str) -> int:
        return sum(term.factors.rank(module) for term in self._of(module))

    def scale(self, module: str) -> float:
        scales = {term.factors.scale(module) for term in self._of(module)}
        return scales.pop() if len(scales) == 1 else 1.0

    def inner(self, module: str, leading: Shape) -> torch.Tensor:
        return torch.cat([term.factors.inner(module, leading).float() for term in self._of(module)])

    def outer(self, module: str, leading: Shape, rows: Sequence[tuple[int, int]] | None = None) -> torch.Tensor:
        parts, scale = [], self.scale(module)
        for term in self._of(module):
            factor = term.weight * (term.factors.scale(module) / scale)
            parts.append(term.factors.outer(module, leading, rows).float() * factor)
        return torch.cat(parts, dim=1)

    def _of(self, module: str) -> list[Term]:
        return [term for term in self._terms if module in term.factors.target_modules]


class UniformFactors(Factors):
    """The same factors with one rank and one scale in all modules, for readers that know only these.

    Smaller ranks are filled up with zeros. If the scales differ, all are 1, and the others are multiplied into B.
    """

    def __init__(self, factors: Factors) -> None:
        super().__init__(factors.architecture, factors.places)
        self._factors = factors
        self._rank = max(map(factors.rank, factors.target_modules))
        scales = set(map(factors.scale, factors.target_modules))
        self._scale = scales.pop() if len(scales) == 1 else 1.0

    @property
    def target_modules(self) -> tuple[str, ...]:
        return self._factors.target_modules

    @property
    def dtype(self) -> tuple[str, int]:
        return self._factors.dtype

    def rank(self, module: str) -> int:
        del module
        return self._rank

    def scale(self, module: str) -> float:
        del module
        return self._scale

    def inner(self, module: str, leading: Shape) -> torch.Tensor:
        missing = self._rank - self._factors.rank(module)
        return torch.nn.functional.pad(self._factors.inner(module, leading), (0, 0, 0, missing))

    def outer(self, module: str, leading: Shape, rows: Sequence[tuple[int, int]] | None = None) -> torch.Tensor:
        found, factor = self._factors.outer(module, leading, rows), self._factors.scale(module) / self._scale
        found = found if factor == 1 else found * factor
        return torch.nn.functional.pad(found, (0, self._rank - self._factors.rank(module)))

"""Read an adapter that PEFT saved as the A and B of Megatron's linear layers.

PEFT has an adapter for each of q, k and v, and for gate and up, where Megatron has one linear layer and so one adapter.
If these share their A, as in what the kit exports, B's rows are put together. Otherwise the ranks are added: A's are
stacked, and each B has its own columns. Adapters of smaller rank than the largest one are filled up with zeros.

Layouts: one pair of factors for each expert (transformers 4, and what the kit exports as `peft`), or stacked over the
experts (transformers 5). PEFT before 0.20 stacks them with the axes of the weight exchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_run.errors import WeightsError
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.weights.adapter.peft_config import scale_of, version_of
from mixtral_run.weights.adapter.schema import LINEAR_KEYS
from mixtral_run.weights.hf.safetensors_files import DTYPES, TensorEntry
from mixtral_run.weights.io.pread import read_whole
from mixtral_run.weights.mapping.hf_to_megatron import Shape, expert_name, hf_tensors, row_ranges

if TYPE_CHECKING:
    from torch import Tensor

_KEY = re.compile(r"(?:base_model\.model\.)?(model\.layers\.\d+\..+?)\.lora_([AB])(?:\.default)?\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_FUSED = {"mlp.experts.base_layer", "mlp.experts"}
_PARAMETERS = {"linear_fc1": "gate_up_proj", "linear_fc2": "down_proj"}
_AXES_SINCE = (0, 20)
"""The PEFT version from which stacked factors have the axes of the weight, [out, in]."""

Block = tuple[str, Shape]
"""A Megatron linear layer: its module, and its layer, or layer and expert."""


@dataclass(frozen=True)
class _Part:
    """An adapter of PEFT on some rows of a block. read: returns A [r, in] and B [rows, r], fp32."""

    rows: tuple[tuple[int, int], ...]
    rank: int
    scale: float
    read: Callable[[], tuple[Tensor, Tensor]]


class PeftFactors:
    """A and B of every linear layer, from the tensors of an adapter. problems: a line for each that has no place.

    scale: the factor that all of them have after what differs is put into B.
    """

    def __init__(
        self, architecture: MixtralArchitecture, entries: Mapping[str, TensorEntry], config: Mapping[str, Any]
    ) -> None:
        self._architecture = architecture
        self._config = config
        self._sizes = _sizes(architecture)
        self._parts: dict[Block, list[_Part]] = {}
        self.problems: list[str] = []
        pairs = self._pairs(entries)
        self._add_separate(pairs)
        self._add_fused({name: pair for name, pair in pairs.items() if _inner(name) in _FUSED})
        self._shared: set[Block] = set()
        self.rank = 0
        self.scale = scale_of(config, "", int(config["r"])) if not self.problems else 1.0

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Return the linear layers that have an adapter, by Megatron's names."""
        found = {module for module, _ in self._parts}
        return tuple(module for module in LINEAR_KEYS if module in found)

    def settle_rank(self) -> None:
        """Find the rank that all adapters fit into; A's that are to be shared are compared, which reads them."""
        import torch

        for block, parts in self._parts.items():
            ranks = {part.rank for part in parts}
            if len(parts) > 1 and len(ranks) == 1:
                first, *others = (part.read()[0] for part in parts)
                if all(torch.equal(first, other) for other in others):
                    self._shared.add(block)
            needed = max(ranks) if block in self._shared else sum(part.rank for part in parts)
            self.rank = max(self.rank, needed)

    def linear_in(self, module: str, leading: Shape) -> Tensor:
        """Return A of a linear layer, fp32 [rank, in]; zeros if PEFT has none there."""
        import torch

        found = torch.zeros(self.rank, self._sizes[module][1])
        for part, first in self._columns((module, leading)):
            found[first : first + part.rank] = part.read()[0]
        return found

    def linear_out(self, module: str, leading: Shape) -> Tensor:
        """Return B of a linear layer, fp32 [out, rank]; zeros if PEFT has none there."""
        import torch

        found = torch.zeros(self._sizes[module][0], self.rank)
        for part, first in self._columns((module, leading)):
            values = part.read()[1]
            if part.scale != self.scale:
                values = values * (part.scale / self.scale)
            done = 0
            for start, stop in part.rows:
                found[start:stop, first : first + part.rank] = values[done : done + stop - start]
                done += stop - start
        return found

    def _columns(self, block: Block) -> list[tuple[_Part, int]]:
        """Return the parts of a block, with the first of the ranks that each of them takes."""
        found, first = [], 0
        for part in self._parts.get(block, []):
            found.append((part, first))
            first += 0 if block in self._shared else part.rank
        return found

    def _pairs(self, entries: Mapping[str, TensorEntry]) -> dict[str, tuple[TensorEntry, TensorEntry]]:
        """Return A and B by the name of the module that they belong to."""
        found: dict[str, dict[str, TensorEntry]] = {}
        for key, entry in entries.items():
            match = _KEY.fullmatch(key)
            if match is None:
                self.problems.append(f"tensor {key} has no place in an adapter of a Mixtral's attention and experts")
            elif entry.dtype not in DTYPES or len(entry.shape) != 2:
                self.problems.append(f"tensor {key}: expected a matrix of {', '.join(DTYPES)}; found {entry.dtype}")
            else:
                found.setdefault(match[1], {})[match[2]] = entry
        whole = {name: (each["A"], each["B"]) for name, each in found.items() if len(each) == 2}
        self.problems += [f"{name}: one of lora_A and lora_B is missing" for name in found if name not in whole]
        if not found and not self.problems:
            self.problems.append("the adapter has no tensors")
        return whole

    def _add_separate(self, pairs: Mapping[str, tuple[TensorEntry, TensorEntry]]) -> None:
        shapes, places = hf_tensors(self._architecture), row_ranges(self._architecture)
        module_of = {key: module for module, key in LINEAR_KEYS.items()}
        for name, (a, b) in pairs.items():
            if _inner(name) in _FUSED:
                continue
            place = places.get(f"{name}.weight")
            if place is None or place.key not in module_of:
                self.problems.append(f"{name}: the kit has no adapter on this module")
                continue
            rows, columns = shapes[f"{name}.weight"]
            rank = a.shape[0]
            if a.shape != (rank, columns) or b.shape != (rows, rank):
                self.problems.append(
                    f"{name}: expected lora_A [r, {columns}] and lora_B [{rows}, r]; "
                    f"found {list(a.shape)} and {list(b.shape)}"
                )
                continue
            if rank != self._config["r"] and not self._config.get("rank_pattern"):
                self.problems.append(
                    f"{name}: expected the r of adapter_config.json, {self._config['r']}; found {rank}"
                )
                continue
            part = _Part(place.rows, rank, scale_of(self._config, name, rank), _reader(a, b))
            self._parts.setdefault((module_of[place.key], place.leading), []).append(part)

    def _add_fused(self, pairs: Mapping[str, tuple[TensorEntry, TensorEntry]]) -> None:
        if not pairs:
            return
        fitting = [transposed for transposed in (False, True) if self._fused_modules(pairs, transposed) is not None]
        if len(fitting) == 2:
            version = version_of(self._config)
            fitting = [] if version is None else [version < _AXES_SINCE]
        if not fitting:
            name, (a, b) = next(iter(pairs.items()))
            self.problems.append(
                f"{name}: lora_A {list(a.shape)} and lora_B {list(b.shape)} are not those of the "
                f"{self._architecture.num_experts} experts of this model, or peft_version, which tells two layouts "
                "apart, is missing"
            )
            return
        modules = self._fused_modules(pairs, fitting[0]) or {}
        for name, module in modules.items():
            self._add_stack(name, module, *pairs[name], transposed=fitting[0])

    def _fused_modules(
        self, pairs: Mapping[str, tuple[TensorEntry, TensorEntry]], transposed: bool
    ) -> dict[str, str] | None:
        """Return the linear layer that each stack belongs to by its shape, None if one of them has no such shape."""
        found = {}
        for name, (a, b) in pairs.items():
            size = (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
            module = next((module for module in _PARAMETERS if self._sizes[module] == size), None)
            if module is None or a.shape[0] != b.shape[1] or a.shape[0] % self._architecture.num_experts:
                return None
            found[name] = module
        return found

    def _add_stack(self, name: str, module: str, a: TensorEntry, b: TensorEntry, *, transposed: bool) -> None:
        match = _LAYER.fullmatch(name)
        assert match is not None
        layer, experts = int(match[1]), self._architecture.num_experts
        if layer >= self._architecture.num_layers:
            self.problems.append(f"{name}: the model has {self._architecture.num_layers} layers")
            return
        rank = a.shape[0] // experts
        scale = scale_of(self._config, f"model.layers.{layer}.mlp.experts.{_PARAMETERS[module]}", rank)
        rows = ((0, self._sizes[module][0]),)
        for expert in range(experts):
            read = _stack_reader(a, b, experts, expert, transposed)
            if (module, (layer, expert)) in self._parts:
                first = expert_name(layer, expert, "w1")
                self.problems.append(f"{name}: {first} has an adapter of its own as well")
                return
            self._parts[module, (layer, expert)] = [_Part(rows, rank, scale, read)]


def _inner(name: str) -> str:
    match = _LAYER.fullmatch(name)
    return "" if match is None else match[2]


def _sizes(a: MixtralArchitecture) -> dict[str, tuple[int, int]]:
    """Return rows and columns of each linear layer, of one expert where it has experts."""
    return {
        "linear_qkv": (a.qkv_size, a.hidden_size),
        "linear_proj": (a.hidden_size, a.projection_size),
        "linear_fc1": (2 * a.ffn_hidden_size, a.hidden_size),
        "linear_fc2": (a.hidden_size, a.ffn_hidden_size),
    }


def _reader(a: TensorEntry, b: TensorEntry) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (_read(a), _read(b))


def _stack_reader(
    a: TensorEntry, b: TensorEntry, experts: int, expert: int, transposed: bool
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a reader of one expert: A's rows go expert by expert, B's columns rank by rank with the experts within."""

    def read() -> tuple[Tensor, Tensor]:
        rank = a.shape[0] // experts
        first = _read(a).view(experts, rank, a.shape[1])[expert]
        second = _read(b).view(b.shape[0], rank, experts)[:, :, expert]
        return (second.t().contiguous(), first.t().contiguous()) if transposed else (first, second.contiguous())

    return read


def _read(entry: TensorEntry) -> Tensor:
    """Read a tensor as fp32."""
    import os

    import torch

    data = bytearray(entry.num_bytes)
    descriptor = os.open(entry.file, os.O_RDONLY)
    try:
        read_whole(descriptor, memoryview(data), entry.start, Path(entry.file))
    finally:
        os.close(descriptor)
    assert len(data) == prod(entry.shape) * DTYPES[entry.dtype][1]
    values = torch.frombuffer(data, dtype=getattr(torch, DTYPES[entry.dtype][0])).view(entry.shape).float()
    if not bool(values.isfinite().all()):
        raise WeightsError(
            "The PEFT adapter has weights that are no numbers.",
            where=f"{entry.file}: {entry.name}",
            expected="finite numbers",
            found=f"{int((~values.isfinite()).sum()):,} of {values.numel():,} are NaN or infinite",
            next_command="an earlier checkpoint of that training run, whose loss became NaN",
        )
    return values

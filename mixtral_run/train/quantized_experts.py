"""A model's experts in 8 or 4 bit from the folder beside the base where they are kept, or kept there on their way.

The folder: weights/quantized_cache/layout.py. All ranks take part in each call and come to the same end: a folder is
used when every rank
sees the same whole one, and put in its place when every rank has written its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_run.errors import WeightsError
from mixtral_run.model.experts import Experts
from mixtral_run.model.kernels.quantized.quantized_mm import KEPT_AS
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.report import Report
from mixtral_run.weights.load.read_parts import Part, checksums_of, read_parts
from mixtral_run.weights.manifest.describe import BaseDescription
from mixtral_run.weights.mapping.row_index import Slice
from mixtral_run.weights.quantized_cache import layout
from mixtral_run.weights.quantized_cache.writer import CannotKeep, Keeping, Writer, begin, in_words


@dataclass(frozen=True)
class Keep:
    """What a run does with experts kept beside its base: yes, take and make them; use, take them; no, neither.

    reserve_bytes: what the run will write to the same disk.
    """

    mode: str = "no"
    report: Report = field(default_factory=Report.silent)
    reserve_bytes: int = 0


class KeptExperts:
    """Those of one model and its base. Does nothing where the base's precision is bf16."""

    def __init__(self, model: MixtralModel, base: BaseDescription, keep: Keep) -> None:
        self._model = model
        self._base = base
        self._keep = keep
        precision = model.settings.base_precision
        self._dtype = layout.rounded_to(base.dtype, str(model.settings.dtype).removeprefix("torch."))
        self._files = layout.Files(layout.kept_folder(base.folder, precision), base.architecture, precision)
        self._why = ""
        self._refused: layout.Kept | None = None

    def find(self) -> layout.Kept | None:
        """What is kept and every rank can read. All ranks must call."""
        if self._keep.mode == "no" or self._files.precision == "bf16":
            return None
        mine = self._look()
        everyones = _of_all_ranks((mine.kept.digest if mine.kept else None, mine.why))
        if mine.kept is not None and len({digest for digest, _ in everyones}) == 1:
            return mine.kept
        self._why = next((why for _, why in everyones if why), "")
        if not self._why and any(digest is not None for digest, _ in everyones):
            self._why = "not the same for all processes"
        return None

    def refuse(self, found: layout.Kept, why: str) -> None:
        """What `find` found is of no use after all. All ranks must call with the same."""
        self._refused, self._why = found, why

    def load(self, found: layout.Kept) -> bool:
        """Fill the model's experts from there; False, and they are as before, where its bytes are not what was written.

        Memory: the experts' own and what read_parts takes. All ranks must call.
        """
        size = self._files.num_bytes / 1e6
        self._say(f"Experts in {self._files.precision}, quantized before, from {self._files.folder}: {size:,.0f} MB")
        linears = [linear for experts in self._model.experts for linear in experts.linears.values()]
        for linear in linears:
            linear.allocate_quantized()
        parts = list(self._parts())
        places = {part.rows.source: part.place for part in parts}
        try:
            problems = layout.differing(found, places, checksums_of(places, read_parts(parts)))
        except WeightsError as error:
            problems = [f"{error.where}: {error.found or error.what}"]
        damaged = [each[0] for each in _of_all_ranks(problems) if each]
        for linear in linears:
            linear.finish_quantized(whole=not damaged)
        if damaged:
            self.refuse(found, f"damaged: {damaged[0]}")
        return not damaged

    def _parts(self) -> Iterator[Part]:
        """What this rank has to read of the folder."""
        first = self._first_expert()
        for layer, experts in enumerate(self._model.experts):
            entries = self._files.entries(layer)
            for (linear, part), stacked in stored_tensors(experts).items():
                for number, tensor in enumerate(stacked.unbind(0), first):
                    entry = entries[layout.tensor_name(layer, number, linear, part)]
                    matrix = tensor.view(1 if tensor.dim() == 1 else len(tensor), -1).view(torch.uint8)
                    rows, columns = matrix.shape
                    whole = Slice(entry.name, 0, rows, columns, 0, columns, 0)
                    yield Part(whole, layout.source_of(entry), torch.uint8, matrix)

    @contextmanager
    def making(self) -> Iterator[Making]:
        """For quantizing: takes each layer's experts, and puts the folder in its place on `commit`.

        Says why experts are quantized though some are there. Leaves nothing where the work within fails. All ranks must
        call.
        """
        if self._why:
            self._warn(f"{self._files.folder} is not used: {self._why}. The experts are quantized again")
        making = self._begin() if self._keep.mode == "yes" and self._files.precision != "bf16" else Making()
        try:
            yield making
        except BaseException:
            making.abandon()
            raise

    def _begin(self) -> Making:
        """Rank 0 makes the files; the others open them where they write."""
        mesh = self._model.mesh
        size = self._files.num_bytes / 1e6
        keeping: Keeping | None = None
        told: list[Any] = [None]
        if mesh.is_first:
            try:
                keeping = begin(self._base.folder, self._files, self._keep.reserve_bytes, self._is_there_by_now)
                told[0] = keeping.files
                where = f"in {self._files.folder}, {size:,.0f} MB, for the next start"
                self._say(f"Keeping the experts in {self._files.precision} {where}")
            except CannotKeep as error:
                if error.expected:
                    self._say(self._not_kept(str(error)))
                else:
                    self._tell_failure(str(error))
        dist.broadcast_object_list(told, src=0)
        if told[0] is None:
            return Making()
        # Of processes that hold the same experts, the first one writes.
        writes = dist.get_rank(mesh.expert_data_group) == 0
        writer = Writer(told[0], self._first_expert()) if writes else None
        return Making(keeping, writer, self._record(), self._tell_failure)

    def _record(self) -> dict[str, Any]:
        """What the folder's record says beside the base's fingerprint and the checksums."""
        device = self._model.mesh.device
        return {
            "layout": layout.LAYOUT,
            "precision": self._files.precision,
            "method": KEPT_AS[self._files.precision],
            "dtype": self._dtype,
            "architecture": self._base.architecture.to_mapping(),
            "made_on": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "base": layout.identity(self._base),
        }

    def _first_expert(self) -> int:
        mesh = self._model.mesh
        return mesh.expert_rank * (self._base.architecture.num_experts // mesh.expert_size)

    def _is_there_by_now(self) -> bool:
        there = self._look().kept
        return there is not None and (self._refused is None or there.written != self._refused.written)

    def _look(self) -> layout.Look:
        return layout.look(self._base, self._files.precision, self._dtype)

    def _tell_failure(self, why: str) -> None:
        self._warn(f"{self._not_kept(why)} (--keep-quantised use does not try)")

    def _not_kept(self, why: str) -> str:
        return f"This run does not keep its experts in {self._files.precision} in {self._files.folder}: {why}"

    def _say(self, text: str) -> None:
        if self._model.mesh.is_first:
            self._keep.report.say(text)

    def _warn(self, text: str) -> None:
        if self._model.mesh.is_first:
            self._keep.report.warn(text)


class Making:
    """The folder in the making, on one rank; without arguments none is made."""

    def __init__(
        self,
        keeping: Keeping | None = None,
        writer: Writer | None = None,
        values: Mapping[str, Any] | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._keeping = keeping
        self._writer = writer
        self._values = values
        self._tell = tell

    def add(self, layer: int, experts: Experts) -> None:
        """Take the quantized experts of a layer, which stay as they are."""
        if self._writer is not None:
            self._writer.add(layer, stored_tensors(experts))

    def commit(self, fingerprint: str, sources: Mapping[str, int] | None = None) -> None:
        """Put the folder in its place once every rank has written, or say why not. All ranks must call.

        fingerprint: the base's, whole. sources: CRC-32 of the experts' HF tensors, where the base is an HF model.
        """
        if self._values is None:
            return
        if self._writer is not None:
            self._writer.finish()
        mine = (self._writer.checksums, self._writer.failure) if self._writer is not None else ({}, None)
        everyones = _of_all_ranks(mine)
        if self._keeping is None:
            return
        failure = next((why for _, why in everyones if why), None)
        if failure is None:
            base = {**self._values["base"], "fingerprint": fingerprint}
            if sources is not None:
                base["tensors"] = {name: f"{crc:08x}" for name, crc in sources.items()}
            checksums = {name: crc for some, _ in everyones for name, crc in some.items()}
            try:
                self._keeping.commit(checksums, **{**self._values, "base": base})
                return
            except OSError as error:
                failure = in_words(error)
        self._keeping.abandon()
        assert self._tell is not None
        self._tell(failure)

    def abandon(self) -> None:
        """Leave nothing behind."""
        if self._writer is not None:
            self._writer.finish()
        if self._keeping is not None:
            self._keeping.abandon()


def stored_tensors(experts: Experts) -> dict[tuple[str, str], Tensor]:
    """What is kept of a layer's quantized experts: (linear, part) → [local experts, …]."""
    found: dict[tuple[str, str], Tensor] = {}
    for name, linear in experts.linears.items():
        assert linear.values is not None
        assert linear.scales is not None
        found |= {(name, "values"): linear.values, (name, "scales"): linear.scales}
    return found


def _of_all_ranks(mine: Any) -> list[Any]:
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    return everyones

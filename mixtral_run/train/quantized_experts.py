"""A model's experts in 8 or 4 bit: read from the quantized cache next to the base, or written to it while quantizing.

Format of the cache: weights/quantized_cache/layout.py. All ranks take part in each call and decide alike: a cache is
read if every rank sees the same complete one, and published when every rank has written its experts.
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
from mixtral_run.terminal.report import Report
from mixtral_run.weights.load.read_parts import Part, checksums_of, read_parts
from mixtral_run.weights.manifest.describe import BaseDescription
from mixtral_run.weights.mapping.row_index import Slice
from mixtral_run.weights.quantized_cache import layout
from mixtral_run.weights.quantized_cache.write_experts import Writer
from mixtral_run.weights.quantized_cache.writer import CacheBuilder, CacheNotWritten, begin, os_error_text


@dataclass(frozen=True)
class CacheOptions:
    """A run's use of the quantized cache of its base.

    Attributes:
        mode: yes reads it, or creates it if it is missing; use only reads; no ignores it.
        report: receives the messages of the first rank.
        reserve_bytes: bytes that the run will write to the same disk for other purposes.
    """

    mode: str = "no"
    report: Report = field(default_factory=Report.silent)
    reserve_bytes: int = 0


class ExpertCache:
    """The quantized cache of one model and its base. Does nothing if the base precision is bf16."""

    def __init__(self, model: MixtralModel, base: BaseDescription, options: CacheOptions) -> None:
        self._model = model
        self._base = base
        self._options = options
        precision = model.settings.base_precision
        self._dtype = layout.cast_dtype(base.dtype, str(model.settings.dtype).removeprefix("torch."))
        self._files = layout.Files(layout.cache_folder(base.folder, precision), base.architecture, precision)
        self._why = ""
        self._rejected: layout.QuantizedCache | None = None

    def find(self) -> layout.QuantizedCache | None:
        """Return the cache if every rank can read the same one, else None. All ranks must call."""
        if self._options.mode == "no" or self._files.precision == "bf16":
            return None
        mine = self._local()
        everyones = _of_all_ranks((mine.cache.digest if mine.cache else None, mine.why))
        if mine.cache is not None and len({digest for digest, _ in everyones}) == 1:
            return mine.cache
        self._why = next((why for _, why in everyones if why), "")
        if not self._why and any(digest is not None for digest, _ in everyones):
            self._why = "the ranks see different ones"
        return None

    def reject(self, found: layout.QuantizedCache, why: str) -> None:
        """Mark the cache that `find` returned as unusable. All ranks must call with the same arguments."""
        self._rejected, self._why = found, why

    def load(self, found: layout.QuantizedCache) -> bool:
        """Fill the model's experts from the cache. All ranks must call.

        Memory: the experts' own and the buffers of read_parts.

        Returns:
            False if the cache is damaged; then the experts are as before.
        """
        size = self._files.num_bytes / 1e6
        self._say(f"Experts in {self._files.precision} from the quantized cache {self._files.folder}: {size:,.0f} MB")
        linears = [linear for experts in self._model.experts for linear in experts.linears.values()]
        for linear in linears:
            linear.allocate_quantized()
        parts = list(self._parts())
        places = {part.rows.source: part.place for part in parts}
        try:
            problems = layout.checksum_problems(found, places, checksums_of(places, read_parts(parts)))
        except WeightsError as error:
            problems = [f"{error.where}: {error.found or error.what}"]
        damaged = [each[0] for each in _of_all_ranks(problems) if each]
        for linear in linears:
            linear.finish_quantized(whole=not damaged)
        if damaged:
            self.reject(found, f"damaged: {damaged[0]}")
        return not damaged

    def _parts(self) -> Iterator[Part]:
        """Yield the parts of the cache that this rank reads."""
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
    def building(self) -> Iterator[CacheBuild]:
        """Yield a CacheBuild that takes each layer's experts and publishes the cache on `commit`. All ranks must call.

        Warns if an existing cache is not used. Removes the unfinished cache if the block fails.
        """
        if self._why:
            self._warn(f"{self._files.folder} is not used: {self._why}. The experts are quantized again")
        build = self._begin() if self._options.mode == "yes" and self._files.precision != "bf16" else CacheBuild()
        try:
            yield build
        except BaseException:
            build.abandon()
            raise

    def _begin(self) -> CacheBuild:
        """Create the files on rank 0; the other ranks open them to write their own parts."""
        mesh = self._model.mesh
        size = self._files.num_bytes / 1e6
        builder: CacheBuilder | None = None
        files: list[Any] = [None]
        if mesh.is_first:
            try:
                builder = begin(self._base.folder, self._files, self._options.reserve_bytes, self._exists_by_now)
                files[0] = builder.files
                self._say(f"Writing the quantized cache {self._files.folder}, {size:,.0f} MB, for the next start")
            except CacheNotWritten as error:
                if error.expected:
                    self._say(self._not_written(str(error)))
                else:
                    self._report_failure(str(error))
        dist.broadcast_object_list(files, src=0)
        if files[0] is None:
            return CacheBuild()
        # Among the ranks that hold the same experts, the first one writes.
        writes = dist.get_rank(mesh.expert_data_group) == 0
        writer = Writer(files[0], self._first_expert()) if writes else None
        return CacheBuild(builder, writer, self._record(), self._report_failure)

    def _record(self) -> dict[str, Any]:
        """Return the contents of the cache's record, except for the base's fingerprint and the checksums."""
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

    def _exists_by_now(self) -> bool:
        found = self._local().cache
        return found is not None and (self._rejected is None or found.written != self._rejected.written)

    def _local(self) -> layout.CacheLookup:
        return layout.find_cache(self._base, self._files.precision, self._dtype)

    def _report_failure(self, why: str) -> None:
        self._warn(f"{self._not_written(why)} (--quantized-cache use does not try)")

    def _not_written(self, why: str) -> str:
        return f"This run does not write the quantized cache {self._files.folder}: {why}"

    def _say(self, text: str) -> None:
        if self._model.mesh.is_first:
            self._options.report.say(text)

    def _warn(self, text: str) -> None:
        if self._model.mesh.is_first:
            self._options.report.warn(text)


class CacheBuild:
    """The cache that is being written, on one rank. Without arguments none is written."""

    def __init__(
        self,
        builder: CacheBuilder | None = None,
        writer: Writer | None = None,
        values: Mapping[str, Any] | None = None,
        report_failure: Callable[[str], None] | None = None,
    ) -> None:
        self._builder = builder
        self._writer = writer
        self._values = values
        self._report_failure = report_failure

    def add(self, layer: int, experts: Experts) -> None:
        """Have the quantized experts of a layer written, which must not change afterwards."""
        if self._writer is not None:
            self._writer.add(layer, stored_tensors(experts))

    def commit(self, fingerprint: str, sources: Mapping[str, int] | None = None) -> None:
        """Publish the cache once every rank has written its part, or warn why not. All ranks must call.

        Args:
            fingerprint: the base's complete fingerprint.
            sources: CRC-32 of the experts' HF tensors if the base is an HF model.
        """
        if self._values is None:
            return
        if self._writer is not None:
            self._writer.finish()
        mine = (self._writer.checksums, self._writer.failure) if self._writer is not None else ({}, None)
        everyones = _of_all_ranks(mine)
        if self._builder is None:
            return
        failure = next((why for _, why in everyones if why), None)
        if failure is None:
            base = {**self._values["base"], "fingerprint": fingerprint}
            if sources is not None:
                base["tensors"] = {name: f"{crc:08x}" for name, crc in sources.items()}
            checksums = {name: crc for some, _ in everyones for name, crc in some.items()}
            try:
                self._builder.commit(checksums, **{**self._values, "base": base})
                return
            except OSError as error:
                failure = os_error_text(error)
        self._builder.abandon()
        assert self._report_failure is not None
        self._report_failure(failure)

    def abandon(self) -> None:
        """Remove the unfinished cache."""
        if self._writer is not None:
            self._writer.abandon()
        if self._builder is not None:
            self._builder.abandon()


def stored_tensors(experts: Experts) -> dict[tuple[str, str], Tensor]:
    """Return the tensors of a layer's experts that the cache stores: (linear, part) → [local experts, …]."""
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

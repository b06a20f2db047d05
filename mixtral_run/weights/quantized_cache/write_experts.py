"""Write one rank's experts into the files of a cache, beside loading, several layers at once.

A layer of Mixtral is 1.4 GB in 8 bit, and is read and quantized in a fraction of a second. Linux admits one writer at a
time to a file, which gets from 0.6 GB/s in memory that was not touched before to 3 GB/s; other files do not wait.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Mapping

import torch
from isal.isal_zlib import crc32
from torch import Tensor

from mixtral_run.weights.hf.safetensors_files import TensorEntry
from mixtral_run.weights.io.host_parts import ToHost, host_parts
from mixtral_run.weights.io.pace import num_cores
from mixtral_run.weights.io.pwrite import write_whole
from mixtral_run.weights.quantized_cache.layout import Files, tensor_name
from mixtral_run.weights.quantized_cache.writer import os_error_text

MOST_THREADS = 16
AT_ONCE = 2
"""Threads that write a file at once: one copies from the GPU and computes the checksum while the other one writes."""


class _LayerFile:
    """A layer's file: the tensors that no thread has taken yet, and how many threads write.

    ready: on a GPU, the end of the tensors' computation.
    """

    def __init__(
        self, descriptor: int, waiting: deque[tuple[TensorEntry, Tensor]], ready: torch.cuda.Event | None
    ) -> None:
        self.descriptor = descriptor
        self.waiting = waiting
        self.num_writing = 0
        self.ready = ready


class Writer:
    """Writes one rank's experts in threads of its own. After an error nothing more is written, and `failure` has it.

    Memory: one part (host_parts.py) for each thread on a GPU. Tensors on a CPU are written from where they are.

    Attributes:
        checksums: CRC-32 of each tensor by its name, complete after `finish`.
        failure: the reason in one line after an OSError, else None.
    """

    def __init__(self, files: Files, first_expert: int) -> None:
        """Start the threads. first_expert: the number of the first expert of this rank."""
        self._files = files
        self._first = first_expert
        self._layers: list[_LayerFile] = []
        self._changed = threading.Condition()
        self._is_over = self._is_stopped = False
        self._error: BaseException | None = None
        self.checksums: dict[str, int] = {}
        # Daemons: they cannot keep a process whose disk does not answer.
        self._threads = [
            threading.Thread(target=self._work, name=f"quantized-cache_{number}", daemon=True)
            for number in range(num_threads())
        ]
        for each in self._threads:
            each.start()

    @property
    def failure(self) -> str | None:
        return os_error_text(self._error) if isinstance(self._error, OSError) else None

    def add(self, layer: int, tensors: Mapping[tuple[str, str], Tensor]) -> None:
        """Have a layer's experts written; return at once.

        tensors: (linear, part) → [local experts, …]. The caller must neither change nor free them before `finish`.
        """
        if self._is_stopped:
            return
        entries = self._files.entries(layer)
        waiting: deque[tuple[TensorEntry, Tensor]] = deque()
        for (linear, part), stacked in tensors.items():
            for index, tensor in enumerate(stacked.unbind(0), self._first):
                waiting.append((entries[tensor_name(layer, index, linear, part)], tensor))
        try:
            descriptor = os.open(self._files.file(layer), os.O_RDWR)
        except OSError as error:
            self._fail(error)
            return
        with self._changed:
            self._layers.append(_LayerFile(descriptor, waiting, _computed(waiting[0][1])))
            self._changed.notify_all()

    def finish(self) -> None:
        """Wait until everything that was added is on the disk or has failed. Raises errors other than OSError."""
        self._end()
        if self._error is not None and not isinstance(self._error, OSError):
            raise self._error

    def abandon(self) -> None:
        """Write nothing more, and wait for what is being written."""
        self._is_stopped = True
        self._end()

    def _end(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        for each in self._threads:
            each.join()
        for left in self._layers:
            os.close(left.descriptor)
        self._layers.clear()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._is_stopped = True
            self._changed.notify_all()

    def _work(self) -> None:
        to_host = ToHost()
        try:
            while (taken := self._take()) is not None:
                file, entry, tensor = taken
                if file.ready is not None:
                    file.ready.synchronize()
                crc = _write_tensor(file.descriptor, entry, tensor, to_host)
                if self._note(file, entry.name, crc):
                    try:
                        os.fsync(file.descriptor)
                    finally:
                        os.close(file.descriptor)
        except BaseException as error:
            self._fail(error)

    def _take(self) -> tuple[_LayerFile, TensorEntry, Tensor] | None:
        """Wait for a tensor to write, of the file that the fewest write to, and return both; None at the end."""
        with self._changed:
            while not self._is_stopped:
                waiting = [each for each in self._layers if each.waiting]
                if not waiting and self._is_over:
                    break
                file = min(waiting, key=lambda each: each.num_writing, default=None)
                if file is not None and file.num_writing < AT_ONCE:
                    file.num_writing += 1
                    return file, *file.waiting.popleft()
                self._changed.wait()
            return None

    def _note(self, file: _LayerFile, name: str, crc: int) -> bool:
        """Note that a tensor is written; return True if the file is complete, which the caller then closes."""
        with self._changed:
            self.checksums[name] = crc
            file.num_writing -= 1
            self._changed.notify_all()
            is_complete = not file.waiting and not file.num_writing and not self._is_stopped
            if is_complete:
                self._layers.remove(file)
            return is_complete


def num_threads() -> int:
    """Return the number of threads of a Writer: the machine's cores divided by its processes, at least two."""
    return max(2, min(MOST_THREADS, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _computed(tensor: Tensor) -> torch.cuda.Event | None:
    """Return the end of what computes a tensor on a GPU, launched before on the current stream."""
    if not tensor.is_cuda:
        return None
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(tensor.device))
    return event


def _write_tensor(descriptor: int, entry: TensorEntry, tensor: Tensor, to_host: ToHost) -> int:
    """Write a tensor's bytes; return their CRC-32."""
    assert tensor.nbytes == entry.num_bytes, f"{entry.name}: {tensor.nbytes} bytes for {entry.num_bytes}"
    crc, position = 0, entry.start
    for part in host_parts(tensor, to_host):
        data = part.view(torch.uint8).numpy().data
        crc = crc32(data, crc)
        write_whole(descriptor, position, data)
        position += len(data)
    return crc

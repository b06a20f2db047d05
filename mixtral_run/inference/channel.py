"""Documents that the first rank sends to all others, who wait for as long as it takes."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mixtral_run.model.parallel.mesh import Mesh

_LONGEST_WAIT = timedelta(days=365)


class Channel:
    """A way from the first rank to the others for JSON documents. All ranks must construct one.

    The first rank may read from a person or a server meanwhile. The group is the channel's own: other groups time out.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT) if mesh.world_size > 1 else None

    def send(self, document: object) -> None:
        """Send a document. The first rank calls, and each other rank calls `receive`."""
        if self._group is not None:
            text = torch.frombuffer(bytearray(json.dumps(document).encode()), dtype=torch.uint8)
            self._broadcast(torch.tensor([text.numel()]))
            self._broadcast(text)

    def receive(self) -> Any:
        """Return the next document of the first rank."""
        length = torch.zeros(1, dtype=torch.int64)
        self._broadcast(length)
        text = torch.empty(int(length), dtype=torch.uint8)
        self._broadcast(text)
        return json.loads(bytes(text.tolist()))

    def _broadcast(self, tensor: torch.Tensor) -> None:
        """Broadcast from the first rank, not through torch.distributed: a heartbeat would take the wait for a hang."""
        assert self._group is not None
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([tensor], options).wait()

"""State of the random number generators of every rank, so that a run with dropout continues exactly.

Dropout draws from the generator of the rank's device. On a GPU its state is the seed and the offset of Philox, which
the replay of a CUDA graph advances as an eager pass does.
"""

from __future__ import annotations

import base64
import binascii
import json
import random
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mixtral_run.errors import WeightsError
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.weights.io.files import write_atomically

RANDOM_STATE = "random_state.json"
"""File in an iteration's folder."""


def own_random_state(mesh: Mesh) -> dict[str, Any]:
    """Return the state of this rank as JSON values. Rank-local."""
    device = mesh.device
    state: dict[str, Any] = {"python": random.getstate(), "torch": _text(torch.get_rng_state())}
    if device.type == "cuda":
        state["cuda"] = _text(torch.cuda.get_rng_state(device))
    return state


def write_random_state(folder: Path, mesh: Mesh, ranks: Sequence[Mapping[str, Any]]) -> None:
    """Write the states of all ranks, in their order, into an iteration's folder. One process calls."""
    write_atomically(folder / RANDOM_STATE, json.dumps({**_layout(mesh), "ranks": ranks}) + "\n")


def restore_random_state(folder: Path, mesh: Mesh) -> str | None:
    """Set the generators of this rank as an iteration's folder has them.

    Returns None, or why they stay as they are: the checkpoint has no state, or that of another layout or device. Raises
    WeightsError if the file is damaged.
    """
    file = folder / RANDOM_STATE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        # Earlier versions had no context parallelism.
        saved = {"context_size": 1, **values}
        own = values["ranks"][mesh.rank] if all(saved[name] == each for name, each in _layout(mesh).items()) else None
    except FileNotFoundError:
        return "the checkpoint has no state of the random numbers: an earlier version of mixtral-run wrote it"
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise _damaged(file, error) from error
    if own is None:
        return "the number of processes, the layout or the device is another one than before"
    try:
        version, numbers, gauss = own["python"]
        random.setstate((version, tuple(numbers), gauss))
        torch.set_rng_state(_tensor(own["torch"]))
        if mesh.device.type == "cuda":
            torch.cuda.set_rng_state(_tensor(own["cuda"]), mesh.device)
    except (ValueError, KeyError, TypeError, RuntimeError, binascii.Error) as error:
        raise _damaged(file, error) from error
    return None


def _layout(mesh: Mesh) -> dict[str, Any]:
    names = ("world_size", "tensor_size", "expert_size", "context_size")
    return {**{name: getattr(mesh, name) for name in names}, "device": mesh.device.type}


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text, validate=True)), dtype=torch.uint8)


def _damaged(file: Path, error: Exception) -> WeightsError:
    return WeightsError(
        "The state of the random numbers is damaged.",
        where=str(file),
        found=str(error)[:200],
        next_command=f"rm {shlex.quote(str(file))}, after which --resume continues with other dropout",
    )

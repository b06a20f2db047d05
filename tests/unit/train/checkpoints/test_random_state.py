"""The state of random numbers belongs to a layout, in which the ranks that share a row count."""

import json
from pathlib import Path

import pytest
import torch

from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.train.checkpoints.random_state import (
    RANDOM_STATE,
    own_random_state,
    restore_random_state,
    write_random_state,
)


def mesh(context: int) -> Mesh:
    return Mesh(torch.device("cpu"), 0, 2, 0, 1, 0, 1, 0, 2 // context, 0, context)


@pytest.mark.parametrize("saved", [1, 2])
@pytest.mark.parametrize("resumed", [1, 2])
def test_another_size_of_context_parallelism_draws_other_numbers(tmp_path: Path, saved: int, resumed: int) -> None:
    torch.manual_seed(5)
    write_random_state(tmp_path, mesh(saved), [own_random_state(mesh(saved))] * 2)
    expected = torch.rand(3)
    torch.manual_seed(6)
    why = restore_random_state(tmp_path, mesh(resumed))
    assert (why is None) == (saved == resumed)
    assert torch.equal(torch.rand(3), expected) == (saved == resumed)


def test_a_state_of_an_earlier_version_is_one_without(tmp_path: Path) -> None:
    write_random_state(tmp_path, mesh(1), [own_random_state(mesh(1))] * 2)
    values = json.loads((tmp_path / RANDOM_STATE).read_text())
    del values["context_size"]
    (tmp_path / RANDOM_STATE).write_text(json.dumps(values))
    assert restore_random_state(tmp_path, mesh(1)) is None
    assert restore_random_state(tmp_path, mesh(2)) is not None

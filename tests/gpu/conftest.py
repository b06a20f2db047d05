"""Tests of what only a GPU shows. Collected where torch sees one; elsewhere nothing here is a test."""

from collections.abc import Iterator

import pytest
import torch

from mixtral_run.model.kernels.selected import selecting

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py", "kernels/test_*.py", "symmetric/test_*.py"]


@pytest.fixture(params=["auto", "portable"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Compute with the GPU's own set of kernels, and with the portable one."""
    with selecting(request.param):
        yield request.param

"""The adapters of matrices that the kernels of a single token multiply."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Halves:
    """The adapters of some matrices. linear_in: A [matrices, r, in]; linear_out: B [matrices, out, r]; one for all if
    they share it. scale: alpha / r.
    """

    linear_in: Tensor
    linear_out: Tensor
    scale: float


Adapters = tuple[Halves | None, Halves | None]
"""Adapters of the experts' first matrices and of their second."""

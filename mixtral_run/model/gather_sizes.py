"""When tokens are gathered (gathered.py) and how many rows have room then. By arithmetic: the plan counts by it too."""

from __future__ import annotations

SPARE = 2.0
"""Rows for which a process has room, over the mean."""
MOST_TOKENS = 4096
"""Of other processes, that are worth receiving whole instead of asking for the rows that are needed: 34 MB in bf16,
0.1 ms over NVLink four times a layer, where asking costs the host 3 ms."""


def rows_with_room(choices: int, size: int) -> int:
    """Rows that a process of an expert group of `size` has room for; choices: of all tokens of the group."""
    return min(choices, -(-int(choices * SPARE) // size))


def may_run_out(size: int) -> bool:
    """Whether more rows may come than have room."""
    return size > SPARE


def pays(tokens: int, size: int) -> bool:
    """Whether to gather; tokens: of each process."""
    return size > 1 and tokens * (size - 1) <= MOST_TOKENS

"""The policy of exchanges with fixed sizes: when they pay, and the capacity of a process in rows.

It is plain arithmetic, so that the planner (planner/memory_model.py) counts with the same numbers.
"""

from __future__ import annotations

SPARE = 2.0
"""Capacity in rows over the mean, where each process has one expert."""
SPARE_OF_SEVERAL = 1.6
"""Capacity over the mean where a process has several experts, whose loads even out; random weights reach 1.25."""
ONE_EXPERT_EACH = 8
"""Size of a group in which each process has one of Mixtral's experts."""
MOST_TOKENS = 4096
"""Most tokens of other processes for which an all-gather pays: 34 MB in bf16, 0.1 ms over NVLink four times a layer,
while the exchange of counts for an all-to-all costs the host 3 ms."""
MOST_READ = 4096
"""Most tokens of a process for which symmetric memory (symmetric_memory.py) pays. The limit is memory: the capacity is
twice the mean, in the saved activations of each layer too."""


def rows_with_room(choices: int, size: int) -> int:
    """Return the capacity in rows of a process of an expert group of `size`. choices: of all tokens of the group."""
    return min(choices, -(-int(choices * spare(size)) // size))


def spare(size: int) -> float:
    """Return the capacity of a process in a group of `size`, over the mean. In a group of two it holds all rows."""
    return min(SPARE, SPARE_OF_SEVERAL) if 2 < size < ONE_EXPERT_EACH else SPARE


def may_run_out(size: int) -> bool:
    """Return True if more rows than the capacity may come to a process of a group of `size`."""
    return size > spare(size)


def pays(tokens: int, size: int, *, read: bool) -> bool:
    """Return True if an exchange with fixed sizes is faster than an all-to-all.

    tokens: of each process. read: True for symmetric memory, False for an all-gather.
    """
    return size > 1 and (tokens <= MOST_READ if read else tokens * (size - 1) <= MOST_TOKENS)

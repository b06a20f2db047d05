"""When tokens are gathered (all_gather.py) and how many rows have room then. By arithmetic: the plan counts by it
too."""

from __future__ import annotations

SPARE = 2.0
"""Rows for which a process has room, over the mean; with one expert each that much may come."""
SPARE_OF_SEVERAL = 1.6
"""The same where a process has several experts, whose shares even out. With random weights up to 1.25 came."""
ONE_EXPERT_EACH = 8
"""Processes of a group, of which each has one of Mixtral's experts."""
MOST_TOKENS = 4096
"""Of other processes, that are worth receiving whole instead of asking for the rows that are needed: 34 MB in bf16,
0.1 ms over NVLink four times a layer, where asking costs the host 3 ms."""
MOST_READ = 4096
"""Tokens of a process, where GPUs read the rows that they need from each other (symmetric_memory.py): the limit is
the memory, as
there is room for twice the mean, in each layer's kept activations too."""


def rows_with_room(choices: int, size: int) -> int:
    """Rows that a process of an expert group of `size` has room for; choices: of all tokens of the group."""
    return min(choices, -(-int(choices * spare(size)) // size))


def spare(size: int) -> float:
    """Room of a process in a group of `size`, over the mean. Of two each has room for all that can come."""
    return min(SPARE, SPARE_OF_SEVERAL) if 2 < size < ONE_EXPERT_EACH else SPARE


def may_run_out(size: int) -> bool:
    """Whether more rows may come than have room."""
    return size > spare(size)


def pays(tokens: int, size: int, *, read: bool) -> bool:
    """Whether to gather; tokens: of each process; read: by GPUs that read from each other."""
    return size > 1 and (tokens <= MOST_READ if read else tokens * (size - 1) <= MOST_TOKENS)

"""Read ranges of weights files."""

from __future__ import annotations

import os
from pathlib import Path

from mixtral_run.errors import WeightsError


def read_whole(descriptor: int, block: memoryview, position: int, file: Path) -> None:
    """Fill `block` from the file's byte `position`. Raises WeightsError if the disk fails or the file ends."""
    done = 0
    try:
        while done < len(block):
            count = os.preadv(descriptor, [block[done:]], position + done)
            if count == 0:
                raise WeightsError("A weights file became shorter while it was read.", where=str(file))
            done += count
    except OSError as error:
        raise WeightsError(
            "A weights file cannot be read.",
            where=f"{file}, byte {position + done:,}",
            found=error.strerror,
            next_command="dmesg, which reports disk errors",
        ) from error

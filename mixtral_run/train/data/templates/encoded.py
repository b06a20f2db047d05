"""One training example as token ids, with the spans that count in the loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """The tokens of an example.

    Attributes:
        tokens: int32 [length].
        learned: begin and end of each learned span of tokens, in ascending order. A span includes the end-of-turn token
            that generation must produce. No span begins at 0: the first token has no predecessor that predicts it.
    """

    tokens: NDArray[np.int32]
    learned: tuple[tuple[int, int], ...]

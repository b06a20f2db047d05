"""torch's activation checkpointing without the wrapper that is for torch's compiler.

The wrapper imports the compiler at the first call, a second and more, in order to tell it not to compile the function.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch.utils import checkpoint as torch_checkpoint

checkpoint: Any = inspect.unwrap(torch_checkpoint.checkpoint)

"""The only import of megatron-core: everything that the kit uses of it, imported without what it does not need.

On import megatron-core 0.16.1 wraps 35 of its functions in `torch.compile` (megatron/core/jit.py), which loads
TorchInductor: a third of the start time of a process, and 70 MB of its memory. The model here calls none of them. It
also imports wandb and TensorBoard where they are installed, half of the rest of its import, for timers and an inference
engine that the kit does not use. The kit's own loggers import them when they are asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_LOGGERS = ("wandb", "torch.utils.tensorboard")


@contextmanager
def _trimmed() -> Iterator[None]:
    compile_with_torch = torch.compile
    torch.compile = _unchanged  # type: ignore[assignment]
    # None makes their import fail as if they were not installed, which Megatron expects.
    hidden = [name for name in _LOGGERS if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        torch.compile = compile_with_torch
        for name in hidden:
            del sys.modules[name]


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


with _trimmed():
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies.torch import (
        MCoreSavePlanner,
        _replace_state_dict_keys_with_sharded_keys,
        mcore_to_pyt_state_dict,
    )
    from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
    from megatron.core.dist_checkpointing.validation import validate_sharding_integrity
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.tensor_parallel.mappings import (
        all_to_all,
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import BaseTransformerLayer
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

# Megatron's own strategies call this function; it has no public name in 0.16.1.
replace_keys_with_sharded_keys = _replace_state_dict_keys_with_sharded_keys

__all__ = [
    "BaseTransformerLayer",
    "CheckpointingException",
    "ColumnParallelLinear",
    "GPTModel",
    "MCoreSavePlanner",
    "MegatronModule",
    "ModuleSpec",
    "RowParallelLinear",
    "ShardedTensor",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "all_to_all",
    "apply_prefix_mapping",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "initialize_rng_tracker",
    "is_main_replica",
    "make_sharded_tensors_for_checkpoint",
    "mcore_to_pyt_state_dict",
    "parallel_state",
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
    "replace_keys_with_sharded_keys",
    "save_preprocess",
    "validate_sharding_integrity",
]

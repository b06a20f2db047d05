"""The only import of megatron-core: everything that the kit uses of it, imported without the compiler.

On import megatron-core 0.16.1 wraps 35 of its functions in `torch.compile` (megatron/core/jit.py), which loads
TorchInductor: a third of the start time of a process, and 70 MB of its memory. The model here calls none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def _uncompiled() -> Iterator[None]:
    compile_with_torch = torch.compile
    torch.compile = _unchanged  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_with_torch


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


with _uncompiled():
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
]

"""Write the files next to the weights that Megatron-LM and Megatron-Bridge read from a checkpoint.

The formats follow the source of these versions, which was not run: Megatron-LM
`megatron/training/checkpointing.py`, `load_args_from_checkpoint`; Megatron-Bridge 0.3
`training/model_load_save.py` and its config instantiation.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from mixtral_run.model.architecture import VOCABULARY_MULTIPLE, MixtralArchitecture
from mixtral_run.weights.io.files import write_atomically


def write_metadata_json(folder: Path) -> None:
    """Write the file that marks the folder as a distributed checkpoint of this kind for Megatron."""
    content = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    write_atomically(folder / "metadata.json", json.dumps(content))


def write_common(
    folder: Path,
    architecture: MixtralArchitecture,
    dtype: str,
    tensor_parallel_size: int,
    expert_parallel_size: int,
    iteration: int,
) -> None:
    """Write common.pt: the state that is not sharded, with the arguments that Megatron-LM takes from a checkpoint."""
    import torch

    args = megatron_args(architecture, dtype, tensor_parallel_size, expert_parallel_size)
    state = {"args": Namespace(**args), "checkpoint_version": 3.0, "iteration": iteration}
    with (folder / "common.pt").open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())


def megatron_args(
    architecture: MixtralArchitecture, dtype: str, tensor_parallel_size: int, expert_parallel_size: int
) -> dict[str, Any]:
    """Return the model's sizes in the names of Megatron-LM's command line; `params_dtype` is a torch.dtype."""
    import torch

    a, padded = architecture, architecture.padded_vocab_size(tensor_parallel_size)
    window = {} if a.sliding_window is None else {"window_size": (a.sliding_window - 1, 0)}
    return {
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.ffn_hidden_size,
        "seq_length": a.max_position_embeddings,
        "max_position_embeddings": a.max_position_embeddings,
        "num_attention_heads": a.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": a.num_query_groups,
        "kv_channels": a.kv_channels,
        "position_embedding_type": "rope",
        "add_position_embedding": False,
        "use_rotary_position_embeddings": True,
        "rotary_base": int(a.rotary_base),
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "squared_relu": False,
        "swiglu": True,
        "untie_embeddings_and_output_weights": True,
        "apply_layernorm_1p": False,
        "normalization": "RMSNorm",
        "norm_epsilon": a.layernorm_epsilon,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "num_experts": a.num_experts,
        "moe_layer_freq": 1,
        "moe_ffn_hidden_size": a.ffn_hidden_size,
        "moe_router_topk": a.moe_router_topk,
        # Mixtral: softmax over the chosen two, which is top-k first.
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.02,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
        "padded_vocab_size": padded,
        "vocab_size": a.vocab_size,
        "make_vocab_size_divisible_by": 1 if padded == a.vocab_size else VOCABULARY_MULTIPLE,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tensor_model_parallel_size": tensor_parallel_size,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": expert_parallel_size,
        "expert_tensor_parallel_size": 1,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "params_dtype": getattr(torch, dtype),
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
        "finetune": True,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
        **window,
    }


def write_run_config(
    folder: Path,
    architecture: MixtralArchitecture,
    dtype: str,
    tensor_parallel_size: int,
    expert_parallel_size: int,
) -> None:
    """Write run_config.yaml, with the model section that Megatron-Bridge instantiates."""
    import yaml

    a = architecture
    torch_dtype = {"_target_": f"torch.{dtype}", "_call_": False}
    padded = a.padded_vocab_size(tensor_parallel_size) != a.vocab_size
    special: dict[str, Any] = {"should_pad_vocab": padded}
    if padded:
        special["make_vocab_size_divisible_by"] = VOCABULARY_MULTIPLE
    if a.sliding_window is not None:
        special["window_size"] = [a.sliding_window - 1, 0]
    model = {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.ffn_hidden_size,
        "moe_ffn_hidden_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_query_groups": a.num_query_groups,
        "kv_channels": a.kv_channels,
        "num_moe_experts": a.num_experts,
        "moe_router_topk": a.moe_router_topk,
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.02,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
        "vocab_size": a.vocab_size,
        **special,
        "seq_length": a.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": a.rotary_base,
        "rotary_percent": 1.0,
        "normalization": "RMSNorm",
        "layernorm_epsilon": a.layernorm_epsilon,
        "gated_linear_unit": True,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "share_embeddings_and_output_weights": False,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "params_dtype": torch_dtype,
        "pipeline_dtype": torch_dtype,
        "tensor_model_parallel_size": tensor_parallel_size,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": expert_parallel_size,
        "expert_tensor_parallel_size": 1,
        "sequence_parallel": tensor_parallel_size > 1,
    }
    write_atomically(folder / "run_config.yaml", yaml.safe_dump({"model": model}, sort_keys=False))

"""Sizes and settings that Megatron-LM and Megatron-Bridge read from a converted checkpoint, written out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
import yaml

from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.weights.torch_dist.megatron_files import (
    megatron_args,
    write_common,
    write_metadata_json,
    write_run_config,
)

TINY = MixtralArchitecture(
    num_layers=2, hidden_size=8, ffn_hidden_size=6, num_attention_heads=4, num_query_groups=2, kv_channels=4,
    num_experts=3, moe_router_topk=2, vocab_size=10, max_position_embeddings=64, rotary_base=1e6,
    layernorm_epsilon=1e-5, sliding_window=16,
)  # fmt: skip


def test_what_megatron_lm_takes_from_a_checkpoint(tmp_path: Path) -> None:
    expected = {
        "num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 6, "seq_length": 64, "max_position_embeddings": 64,
        "num_attention_heads": 4, "group_query_attention": True, "num_query_groups": 2, "kv_channels": 4,
        "position_embedding_type": "rope", "add_position_embedding": False, "use_rotary_position_embeddings": True,
        "rotary_base": 1000000, "rotary_percent": 1.0, "rotary_interleaved": False, "add_bias_linear": False,
        "add_qkv_bias": False, "squared_relu": False, "swiglu": True, "untie_embeddings_and_output_weights": True,
        "apply_layernorm_1p": False, "normalization": "RMSNorm", "norm_epsilon": 1e-5,
        "apply_query_key_layer_scaling": False, "attention_dropout": 0.0, "hidden_dropout": 0.0, "num_experts": 3,
        "moe_layer_freq": 1, "moe_ffn_hidden_size": 6, "moe_router_topk": 2, "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax", "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.02, "moe_token_dispatcher_type": "alltoall", "moe_grouped_gemm": True,
        "padded_vocab_size": 10, "vocab_size": 10, "make_vocab_size_divisible_by": 1,
        "tokenizer_type": "HuggingFaceTokenizer", "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1, "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": 3, "expert_tensor_parallel_size": 1, "bf16": False, "fp16": True,
        "params_dtype": torch.float16, "ckpt_format": "torch_dist", "no_save_optim": True, "no_save_rng": True,
        "finetune": True, "consumed_train_samples": 0, "consumed_valid_samples": 0, "skipped_train_samples": 0,
        "window_size": (15, 0),
    }  # fmt: skip
    args = megatron_args(TINY, "float16", 2, 3)
    assert args == expected
    # 10 rows over three ranks: a multiple of 128 times 3.
    padded = megatron_args(TINY, "bfloat16", 3, 1)
    assert (padded["padded_vocab_size"], padded["make_vocab_size_divisible_by"]) == (384, 128)
    assert (padded["bf16"], padded["fp16"], padded["params_dtype"]) == (True, False, torch.bfloat16)
    whole = megatron_args(TINY, "float32", 1, 1)
    assert (whole["bf16"], whole["fp16"], whole["params_dtype"]) == (False, False, torch.float32)
    write_common(tmp_path, TINY, "float16", 2, 3, 7)
    state = torch.load(tmp_path / "common.pt", weights_only=False)
    assert (vars(state["args"]), state["checkpoint_version"], state["iteration"]) == (args, 3.0, 7)
    write_metadata_json(tmp_path)
    assert json.loads((tmp_path / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist", "sharded_backend_version": 1,
        "common_backend": "torch", "common_backend_version": 1,
    }  # fmt: skip


def test_what_megatron_bridge_takes_from_a_checkpoint(tmp_path: Path) -> None:
    expected = {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider", "num_layers": 2, "hidden_size": 8,
        "ffn_hidden_size": 6, "moe_ffn_hidden_size": 6, "num_attention_heads": 4, "num_query_groups": 2,
        "kv_channels": 4, "num_moe_experts": 3, "moe_router_topk": 2, "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.02,
        "moe_token_dispatcher_type": "alltoall", "moe_grouped_gemm": True, "vocab_size": 10,
        "should_pad_vocab": False, "window_size": [15, 0], "seq_length": 64, "position_embedding_type": "rope",
        "rotary_base": 1e6, "rotary_percent": 1.0, "normalization": "RMSNorm", "layernorm_epsilon": 1e-5,
        "gated_linear_unit": True, "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "add_bias_linear": False, "add_qkv_bias": False, "attention_dropout": 0.0, "hidden_dropout": 0.0,
        "share_embeddings_and_output_weights": False, "bf16": True, "fp16": False,
        "params_dtype": {"_target_": "torch.bfloat16", "_call_": False},
        "pipeline_dtype": {"_target_": "torch.bfloat16", "_call_": False}, "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1, "expert_model_parallel_size": 3, "expert_tensor_parallel_size": 1,
        "sequence_parallel": True,
    }  # fmt: skip
    write_run_config(tmp_path, TINY, "bfloat16", 2, 3)
    written = yaml.safe_load((tmp_path / "run_config.yaml").read_text())
    assert written == {"model": expected}
    # In the order in which a reader looks for them.
    assert list(written["model"])[:3] == ["_target_", "num_layers", "hidden_size"]
    # Without a window, on one rank, and with a vocabulary that is padded on three.
    no_window = dataclasses.replace(TINY, sliding_window=None)
    write_run_config(tmp_path, no_window, "float16", 1, 1)
    model = yaml.safe_load((tmp_path / "run_config.yaml").read_text())["model"]
    assert (model["sequence_parallel"], model["bf16"], model["fp16"], "window_size" in model) == (
        False, False, True, False,
    )  # fmt: skip
    write_run_config(tmp_path, no_window, "float16", 3, 1)
    model = yaml.safe_load((tmp_path / "run_config.yaml").read_text())["model"]
    assert (model["should_pad_vocab"], model["make_vocab_size_divisible_by"]) == (True, 128)
    write_run_config(tmp_path, no_window, "float32", 1, 1)
    model = yaml.safe_load((tmp_path / "run_config.yaml").read_text())["model"]
    assert (model["bf16"], model["fp16"], model["should_pad_vocab"]) == (False, False, False)
    assert "window_size" not in megatron_args(no_window, "float16", 1, 1)

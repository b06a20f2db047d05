"""Started by torchrun: builds megatron-core's GPTModel from a checkpoint's args, loads it strictly, compares it.

The expected parameters are made here from the HF tensors with torch operations, not with the kit's mapping. Nothing
runs forward, so two small stand-ins let megatron-core be built without a GPU.
"""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file

from mixtral_run.model.architecture import MixtralArchitecture


def config_from(args: Namespace, tp: int, ep: int) -> TransformerConfig:
    """As Megatron-LM makes it of a checkpoint's args (megatron/training/arguments.py), then what a CPU needs."""
    fields = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(TransformerConfig)
        if hasattr(args, field.name)
    }
    assert args.swiglu
    assert args.group_query_attention
    fields |= {
        "layernorm_epsilon": args.norm_epsilon,
        "num_moe_experts": args.num_experts,
        "activation_func": torch.nn.functional.silu,
        "gated_linear_unit": True,
        "bias_activation_fusion": False,
        "tensor_model_parallel_size": tp,
        "expert_model_parallel_size": ep,
        "sequence_parallel": tp > 1,
        "use_cpu_initialization": True,
        "moe_token_dispatcher_type": "allgather",
        "moe_grouped_gemm": False,
    }
    return TransformerConfig(**fields)


def build(args: Namespace, tp: int, ep: int, stages: int = 1, *, te_keys: bool = True) -> GPTModel:
    config = config_from(args, tp, ep)
    config.pipeline_model_parallel_size = stages
    config.pipeline_dtype = config.params_dtype
    config.sequence_parallel = False  # MoE asks for it when built; the local norm refuses it
    spec = get_gpt_layer_local_spec(
        num_experts=args.num_experts, moe_grouped_gemm=False, normalization=args.normalization
    )
    if te_keys:
        # With Transformer Engine, which the key names are for, this norm stands alone.
        spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return GPTModel(
        config,
        spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        rotary_percent=args.rotary_percent,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    )


def expected(name: str, hf: dict[str, torch.Tensor], a: MixtralArchitecture, tp: int, ep: int) -> torch.Tensor:
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    outside = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "output_layer.weight": "lm_head.weight",
    }
    if name in outside:
        return hf[outside[name]].chunk(tp)[tp_rank]
    if name == "decoder.final_layernorm.weight":
        return hf["model.norm.weight"]
    _, _, layer, rest = name.split(".", 3)
    prefix = f"model.layers.{layer}."
    if rest == "self_attention.linear_qkv.weight":
        groups, hd, hidden = a.num_query_groups, a.kv_channels, a.hidden_size
        q, k, v = (hf[f"{prefix}self_attn.{p}_proj.weight"] for p in "qkv")
        heads = a.num_attention_heads // groups
        parts = (q.view(groups, heads, hd, hidden), k.view(groups, 1, hd, hidden), v.view(groups, 1, hd, hidden))
        return torch.cat(parts, dim=1).reshape(-1, hidden).chunk(tp)[tp_rank]
    if rest == "self_attention.linear_proj.weight":
        return hf[prefix + "self_attn.o_proj.weight"].chunk(tp, dim=1)[tp_rank]
    whole = {
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "mlp.router.weight": "block_sparse_moe.gate.weight",
    }
    if rest in whole:
        return hf[prefix + whole[rest]]
    *_, local, linear, _ = rest.split(".")
    expert = parallel_state.get_expert_model_parallel_rank() * (a.num_experts // ep) + int(local)
    w1, w2, w3 = (hf[f"{prefix}block_sparse_moe.experts.{expert}.w{n}.weight"] for n in (1, 2, 3))
    return torch.cat((w1, w3)) if linear == "linear_fc1" else w2


def main() -> None:
    hf_directory, checkpoint, tp, ep = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1
    )
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    hf: dict[str, torch.Tensor] = {}
    for file in hf_directory.glob("*.safetensors"):
        hf |= load_file(file)
    a = MixtralArchitecture.from_hf_directory(hf_directory)
    dtype = next(iter(hf.values())).dtype
    common = dist_checkpointing.load_common_state_dict(checkpoint)
    assert common["checkpoint_version"] == 3.0
    assert common["iteration"] == 1
    model = build(common["args"], tp, ep)
    assert model.config.params_dtype == dtype
    state = dist_checkpointing.load(model.sharded_state_dict(), checkpoint, strict="raise_all")
    for name in common:
        state.pop(name, None)
    model.load_state_dict(state)
    count = 0
    for name, parameter in model.named_parameters():
        # The local norm keeps fp32, into which bf16 goes without loss.
        assert torch.equal(parameter.to(dtype), expected(name, hf, a, tp, ep)), name
        count += 1
    assert count == 3 + a.num_layers * (5 + 2 * a.num_experts // ep)
    print(f"rank {dist.get_rank()}: {count} parameters equal", flush=True)


if __name__ == "__main__":
    main()

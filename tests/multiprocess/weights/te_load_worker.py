"""Loads a checkpoint strictly into megatron-core's GPTModel with its Transformer Engine layers, compares it with HF's.

te_load_worker.py HF_DIRECTORY CHECKPOINT_ITERATION sequential|grouped

Transformer Engine itself does not install without a GPU. What stands in for it here are modules that hold the
parameters that its Linear, LayerNormLinear, GroupedLinear and RMSNorm have (transformer_engine 2.x, pytorch/module),
and an extra state of None; everything that makes a checkpoint's keys of them is megatron-core's own
(extensions/transformer_engine.py, models/gpt/gpt_layer_specs.py). Nothing is computed.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import re
import sys
import types
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file

from mixtral_run.model.architecture import MixtralArchitecture


class _Module(torch.nn.Module):
    """Takes whatever it is given; its extra state is empty, as without FP8."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, _: Any) -> None:
        pass


class Linear(_Module):
    def __init__(
        self, in_features: int, out_features: int, *, parallel_mode: str | None, tp_size: int, **_: Any
    ) -> None:
        super().__init__()
        self.parallel_mode, self.use_bias = parallel_mode, False
        rows = out_features // (tp_size if parallel_mode == "column" else 1)
        columns = in_features // (tp_size if parallel_mode == "row" else 1)
        self.weight = torch.nn.Parameter(torch.empty(rows, columns))


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, *, normalization: str, **more: Any) -> None:
        super().__init__(in_features, out_features, **more)
        assert normalization == "RMSNorm"
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(in_features))


class GroupedLinear(_Module):
    def __init__(self, num_gemms: int, in_features: int, out_features: int, **_: Any) -> None:
        super().__init__()
        self.num_gemms, self.use_bias = num_gemms, False
        self.fp8_meta, self.fp8, self.fp8_calibration = {"fp8_checkpoint": False}, False, False
        for number in range(num_gemms):
            self.register_parameter(f"weight{number}", torch.nn.Parameter(torch.empty(out_features, in_features)))


class RMSNorm(_Module):
    def __init__(self, hidden_size: int, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(hidden_size))

    # Its norms are no TransformerEngineBaseModule: they have no extra state.
    get_extra_state = torch.nn.Module.get_extra_state
    set_extra_state = torch.nn.Module.set_extra_state


class DotProductAttention(_Module):
    pass


def get_cpu_offload_context(*_: Any, **__: Any) -> tuple[None, None]:
    return None, None


HELD = {
    each.__name__: each
    for each in (Linear, LayerNormLinear, GroupedLinear, RMSNorm, DotProductAttention, get_cpu_offload_context)
}


class _Package(types.ModuleType):
    __version__ = "2.5.0"
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        # A class of its own for whatever else is only imported, or derived from.
        return HELD.get(name) or type(name, (_Module,), {})


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """`import transformer_engine…` finds packages that hold the classes above."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != "transformer_engine":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Package(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def main() -> None:
    sys.meta_path.insert(0, _StandIn())
    import torch.distributed as dist
    import transformer_engine.common.recipe
    import transformer_engine.pytorch.distributed
    import transformer_engine.pytorch.ops  # noqa: F401 - reached by attribute in megatron-core
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    from mixtral_run.model.parallel.cpu import stand_in_for_cuda
    from tests.multiprocess.weights.megatron_load_worker import config_from, expected

    hf_directory, checkpoint, experts = Path(sys.argv[1]), *sys.argv[2:4]
    stand_in_for_cuda()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    args = dist_checkpointing.load_common_state_dict(checkpoint)["args"]
    config = config_from(args, 1, 1)
    config.moe_grouped_gemm = experts == "grouped"
    model = GPTModel(
        config,
        get_gpt_layer_with_transformer_engine_spec(args.num_experts, config.moe_grouped_gemm),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        share_embeddings_and_output_weights=False,
    )
    # Strict both ways: no key of the model may be missing from the checkpoint, none of the checkpoint left over.
    state = dist_checkpointing.load(model.sharded_state_dict(), checkpoint, strict="raise_all")
    hf: dict[str, torch.Tensor] = {}
    for file in hf_directory.glob("*.safetensors"):
        hf |= load_file(file)
    a = MixtralArchitecture.from_hf_directory(hf_directory)
    count = 0
    for name, parameter in model.named_parameters():
        assert torch.equal(state[name], expected(local_name(name), hf, a, 1, 1)), name
        assert state[name].shape == parameter.shape, name
        count += 1
    assert count == 3 + a.num_layers * (5 + 2 * a.num_experts)
    print(f"{count} parameters equal")


def local_name(name: str) -> str:
    """The name without Transformer Engine's fused norm and grouped experts."""
    name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
    return re.sub(r"mlp\.experts\.(linear_fc\d)\.weight(\d+)", r"mlp.experts.local_experts.\2.\1.weight", name)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()

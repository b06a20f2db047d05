"""Started by torchrun: megatron-core's GPTModel in as many pipeline stages as processes, loaded and saved again.

torchrun … pipeline_worker.py CHECKPOINT_ITERATION OUT
"""

from __future__ import annotations

import sys

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel

from mixtral_run.model.parallel.cpu import stand_in_for_cuda
from tests.multiprocess.weights.megatron_load_worker import build
from tests.support.references.megatron_writer import let_it_write_from_a_cpu


def main() -> None:
    checkpoint, out = sys.argv[1:3]
    stand_in_for_cuda()
    let_it_write_from_a_cpu()
    dist.init_process_group("gloo")
    stages = dist.get_world_size()
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=stages)
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    common = dist_checkpointing.load_common_state_dict(checkpoint)
    model = build(common["args"], 1, 1, stages)
    assert len(model.decoder.layers) == common["args"].num_layers // stages
    state = dist_checkpointing.load(model.sharded_state_dict(), checkpoint)
    for name in common:
        state.pop(name, None)
    model.load_state_dict(state)
    # The norms of the local layers are kept in fp32; Megatron-LM's own model, which wrote none, has the model's dtype.
    model.to(model.config.params_dtype)
    dist_checkpointing.save(model.sharded_state_dict(), out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

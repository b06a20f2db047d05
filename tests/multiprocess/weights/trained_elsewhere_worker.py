"""Started by torchrun: what a training run of Megatron-LM leaves of a converted checkpoint, by megatron-core itself.

torchrun … trained_elsewhere_worker.py CHECKPOINT_ITERATION OUT te|local

Every weight is doubled, which is exact. Beside the model lie the optimizer's state, as it is and in a bucket, random
number state and the run's arguments, as megatron/training/checkpointing.py has them.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject

from mixtral_run.model.parallel.cpu import stand_in_for_cuda
from tests.multiprocess.weights.megatron_load_worker import build
from tests.support.references.megatron_writer import let_it_write_from_a_cpu


def main() -> None:
    checkpoint, out, keys = sys.argv[1:4]
    stand_in_for_cuda()
    let_it_write_from_a_cpu()
    dist.init_process_group("gloo")
    ep = dist.get_world_size()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ep, expert_tensor_parallel_size=1)
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    common = dist_checkpointing.load_common_state_dict(checkpoint)
    args = common["args"]
    model = build(args, 1, ep)
    state = dist_checkpointing.load(model.sharded_state_dict(), checkpoint)
    for name in common:
        state.pop(name, None)
    model.load_state_dict(state)
    saved = build(args, 1, ep, te_keys=keys == "te")
    saved.load_state_dict(model.state_dict())
    if keys == "te":
        saved.to(model.config.params_dtype)
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.mul_(2)
    args.iteration, args.consumed_train_samples, args.finetune = 100, 800, False
    whole = {"args": args, "checkpoint_version": 3.0, "iteration": 100, "num_floating_point_operations_so_far": 1.0}
    sharded = saved.sharded_state_dict()
    rank = dist.get_rank()
    moment = saved.sharded_state_dict()["embedding.word_embeddings.weight"]
    moment.key = f"chained_0.optimizer.state.exp_avg.{moment.key}"
    bucket = "chained_0.optimizer.distributed.dp_group_idx_0.gbuf_idx_0.bucket_idx_0.exp_avg"
    sharded |= {
        "moment": moment,
        "bucket": ShardedTensor.from_rank_offsets(bucket, torch.zeros(10), (0, rank, ep)),
        "rng_state": ShardedObject("rng_state", [{"random": rank}], (1, ep), (0, rank)),
    }
    dist_checkpointing.save({**whole, **sharded}, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

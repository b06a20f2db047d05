"""A copy for a save in the background has the state of its step, though the next step runs meanwhile. A save at once
writes what the GPU holds."""

import threading
from pathlib import Path

import torch

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.train.checkpoints.host_copy import AdapterCopy
from mixtral_run.train.steps.step import trainable
from mixtral_run.weights.torch_dist.shard_file import write_shards
from tests.gpu.kernels.test_kernels import small_model

CYCLES = 200_000_000
"""About a tenth of a second."""


def test_the_optimizer_waits_for_the_copy_and_the_host_does_not() -> None:
    with open_mesh(LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cuda")) as mesh:
        model = small_model(mesh, "none", "bf16")
        parameters = trainable(model)
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True)

        def step(gradient: float) -> None:
            for each in parameters:
                each.grad = torch.full_like(each, gradient)
            optimizer.step()

        step(0.5)
        copy = AdapterCopy(model, optimizer)
        copy.allocate()
        copy.attach()
        for gradient in (-1.0, 2.0):
            expected = [(each.clone(), optimizer.state[each]["exp_avg"].clone()) for each in parameters]
            torch.cuda.synchronize()
            copy.begin()
            with torch.cuda.stream(copy._stream):
                torch.cuda._sleep(CYCLES)
            thread = threading.Thread(target=copy.finish)
            thread.start()
            step(gradient)
            assert thread.is_alive()  # the copy has not even begun
            thread.join()
            torch.cuda.synchronize()
            found = {state.parameter: state for state in copy.states}
            for parameter, (value, moment) in zip(parameters, expected, strict=True):
                assert torch.equal(found[parameter].value, value.cpu())
                assert torch.equal(found[parameter].moments["exp_avg"], moment.cpu())
                assert not torch.equal(parameter, value)


def test_a_file_written_from_the_gpu_is_that_of_the_host(tmp_path: Path) -> None:
    """Each thread's parts follow one another in the same pinned memory."""
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(size, generator=generator) for size in (1, 1000, 2**20 + 3, 3 * 2**20, 7)]
    tensors += [torch.randn(300, 7000, generator=generator).t(), torch.randn(50, 60, generator=generator).bfloat16()]
    found = [
        write_shards(tmp_path / str(device), [each.to(device) for each in tensors], 4)
        for device in ("cpu", torch.device("cuda", torch.cuda.device_count() - 1))
    ]
    files = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert found[0] == found[1] and files[0] == files[1]

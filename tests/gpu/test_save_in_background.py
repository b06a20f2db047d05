"""A copy for a save in the background has the state of its step, though the next step runs meanwhile."""

import threading

import torch

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.train.checkpoints.host_copy import AdapterCopy
from mixtral_run.train.steps.step import trainable
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

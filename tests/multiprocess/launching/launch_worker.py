"""Jobs that fail in one process or in all of them, started as the verbs start theirs; one JSON line for each error."""

import json
import os
import time

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.errors import MixtralRunError, TrainingError, WeightsError, to_mapping
from mixtral_run.launch.run_job import Job, run_job

CONFIG = LaunchConfig(device="cpu", nproc_per_node=2, tensor_model_parallel_size=2, expert_model_parallel_size=2)
FOREVER_SECONDS = 600


def one_fails(config: LaunchConfig) -> None:
    """The other process waits, and torchrun has to end it."""
    if os.environ["RANK"] == "1":
        raise WeightsError("Only rank 1.", problems=["a", "ü"], next_command="x")
    time.sleep(FOREVER_SECONDS)


def all_fail(config: LaunchConfig) -> None:
    raise TrainingError("All ranks.", found=os.environ["RANK"])


def one_has_a_bug(config: LaunchConfig) -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("a bug")
    time.sleep(FOREVER_SECONDS)


def get_the_config(config: LaunchConfig) -> None:
    """Report the config by way of the error."""
    raise TrainingError(config.to_json() if config == CONFIG else "another config")


def main() -> None:
    for job in (one_fails, all_fail, one_has_a_bug, get_the_config):
        try:
            run_job(Job(f"tests.multiprocess.launching.launch_worker:{job.__name__}"), CONFIG)
        except MixtralRunError as error:
            print(json.dumps(to_mapping(error)), flush=True)


if __name__ == "__main__":
    main()

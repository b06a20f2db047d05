"""A job whose rank 1 hangs in its third step, by the word on the command line: stopped or loop."""

import os
import signal
import sys
from pathlib import Path

from mixtral_run.errors import MixtralRunError
from mixtral_run.launch import processes
from mixtral_run.launch.heartbeat import note_step, start_heartbeat

LIMIT_MINUTES = 0.05
"""Three seconds; the launcher acts after nine tenths of them."""


def spin_for_ever() -> None:
    while True:
        pass


def work(folder: str, how: str) -> None:
    import torch
    import torch.distributed as dist

    start_heartbeat(Path(folder), processes.rank(), LIMIT_MINUTES)
    dist.init_process_group("gloo")
    for step in range(1, 1000):
        note_step(step, on_gpu=False)
        if step == 3 and dist.get_rank() == 1:
            print(f"pid {os.getpid()}", flush=True)
            if how == "loop":
                spin_for_ever()
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(1))


def main() -> None:
    try:
        processes.import_ahead(())
        processes.start_processes(2, work, sys.argv[1])
    except MixtralRunError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

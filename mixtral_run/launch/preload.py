"""Imports of the fork server (processes.py), which the processes of a job then share.

PRELOAD_VARIABLE names the modules of the job, separated by commas. No module may initialize CUDA here, because a
forked process cannot use it then. An import that fails is left to the process that needs it, which reports the error.
"""

import contextlib
import importlib
import os
import signal

# Ctrl-C reaches the fork server as well; only the command itself reports the interruption.
_handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
try:
    from mixtral_run.launch.processes import PRELOAD_VARIABLE
    from mixtral_run.terminal.report import quiet_libraries

    quiet_libraries()

    import torch

    import mixtral_run.launch.run_job  # noqa: F401 - every process calls it

    for _name in filter(None, os.environ.get(PRELOAD_VARIABLE, "").split(",")):
        with contextlib.suppress(Exception):
            importlib.import_module(_name)

    # On GPUs the kernels need Triton, and parts of torch import its compiler, which takes seconds: better here, while
    # the job is planned, than in every process.
    if torch.version.cuda is not None:
        with contextlib.suppress(ImportError):
            import torch._dynamo
            import triton  # noqa: F401
finally:
    signal.signal(signal.SIGINT, _handler)

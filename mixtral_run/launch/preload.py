"""Imports of the fork server (processes.py), which the processes of a job then share.

PRELOAD_VARIABLE names the modules of the job, separated by commas. No module may initialize CUDA here, because a
forked process cannot use it then. An import that fails is left to the process that needs it, which reports the error.
"""

import contextlib
import gc
import importlib
import os
import signal

# The million objects of these imports live as long as the processes. To visit them is a tenth of the time of the
# imports, and in a forked process every visit copies memory.
gc.disable()
# Ctrl-C reaches the fork server as well; only the command itself reports the interruption.
_handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
try:
    from mixtral_run.launch.processes import PRELOAD_VARIABLE
    from mixtral_run.terminal.report import quiet_libraries

    quiet_libraries()

    import torch  # noqa: F401

    import mixtral_run.launch.run_job  # noqa: F401 - every process calls it

    for _name in filter(None, os.environ.get(PRELOAD_VARIABLE, "").split(",")):
        with contextlib.suppress(Exception):
            importlib.import_module(_name)
finally:
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGINT, _handler)

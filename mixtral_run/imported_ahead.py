"""What the processes of a job need, imported once for all of them before they are forked (launch.py).

Nothing here may use a GPU: forked processes could not.
"""

import os
import signal

# Ctrl-C reaches this process as well, and it is for the command to say that it was interrupted.
_kept = signal.signal(signal.SIGINT, signal.SIG_IGN)

from mixtral_run.cli import DEBUG_VARIABLE, quiet_libraries  # noqa: E402

if not os.environ.get(DEBUG_VARIABLE):
    quiet_libraries()

# torch's optimizers import it when the first of them is made; the kernels' modules want Triton, where there is one.
import torch._dynamo  # noqa: E402

import mixtral_run.train.loop  # noqa: E402, F401

if torch.version.cuda is not None:
    import triton
    import triton.experimental.gluon  # noqa: F401

signal.signal(signal.SIGINT, _kept)

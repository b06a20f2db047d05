"""What the processes of a job need, imported once for all of them before they are forked (processes.py).

Nothing here may use a GPU: forked processes could not. What cannot be imported is told by the process that needs it.
"""

import contextlib
import os
import signal

# Ctrl-C reaches this process as well, and it is for the command to say that it was interrupted.
_kept = signal.signal(signal.SIGINT, signal.SIG_IGN)
try:
    from mixtral_run.cli.main import DEBUG_VARIABLE, quiet_libraries

    if not os.environ.get(DEBUG_VARIABLE):
        quiet_libraries()

    # torch's optimizers import it when the first of them is made; the kernels want Triton, where there are GPUs.
    import torch._dynamo

    import mixtral_run.train.loop  # noqa: F401

    if torch.version.cuda is not None:
        with contextlib.suppress(ImportError):
            import triton
            import triton.experimental.gluon  # noqa: F401
finally:
    signal.signal(signal.SIGINT, _kept)

"""`python -m mixtral_run.launch.torchrun`: torch's torchrun with exit codes of its own, and an eye on hung processes.

torchrun itself ends with 1 and a traceback after SIGTERM, even if all processes saved and ended well.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from mixtral_run.launch.hang_watch import watching
from mixtral_run.launch.heartbeat import DIRECTORY_VARIABLE
from mixtral_run.launch.process_exit import exit_with
from mixtral_run.launch.torchrun_errors import exit_code_of


def main() -> NoReturn:
    """Run torchrun with the arguments of this program.

    After a signal the exit code is 128 plus the signal's number. A process of this machine that hangs is named, and the
    exit code is that of a TrainingError.
    """
    from torch.distributed.elastic.agent.server.api import SignalException  # type: ignore[attr-defined]
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    with tempfile.TemporaryDirectory(prefix="mixtral-run-") as folder:
        os.environ[DIRECTORY_VARIABLE] = folder
        try:
            with watching(Path(folder)) as watch:
                torchrun()
        except SignalException as stopped:
            sys.exit(128 + int(stopped.sigval))
        except ChildFailedError as failure:
            if watch.error is not None:
                exit_with(f"✗ {watch.error}", watch.error.exit_code)
            code = exit_code_of(failure)
            if code is None:
                raise
            sys.exit(code)
    sys.exit(0)


if __name__ == "__main__":
    main()

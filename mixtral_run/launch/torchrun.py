"""`python -m mixtral_run.launch.torchrun`: torch's torchrun with an exit code of its own for a job that a signal ended.

torchrun itself ends with 1 and a traceback after SIGTERM, even if all processes saved and ended well.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from mixtral_run.launch.torchrun_errors import exit_code_of


def main() -> NoReturn:
    """Run torchrun with the arguments of this program. After a signal the exit code is 128 plus the signal's number."""
    from torch.distributed.elastic.agent.server.api import SignalException  # type: ignore[attr-defined]
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun()
    except SignalException as stopped:
        sys.exit(128 + int(stopped.sigval))
    except ChildFailedError as failure:
        code = exit_code_of(failure)
        if code is None:
            raise
        sys.exit(code)
    sys.exit(0)


if __name__ == "__main__":
    main()

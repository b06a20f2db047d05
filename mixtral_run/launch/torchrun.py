"""`python -m mixtral_run.launch.torchrun`: torch's own torchrun, which tells a job that was asked to end from one
that failed.

Torch's ends with 1 and a traceback after SIGTERM, however well its processes saved.
"""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run torchrun with this program's own words. After a signal the exit code is 128 plus its number."""
    from torch.distributed.elastic.agent.server.api import SignalException  # type: ignore[attr-defined]
    from torch.distributed.run import main as torchrun

    try:
        torchrun()
    except SignalException as stopped:
        sys.exit(128 + int(stopped.sigval))
    sys.exit(0)


if __name__ == "__main__":
    main()

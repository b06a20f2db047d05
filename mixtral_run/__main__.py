"""`python -m mixtral_run VERB`, `torchrun … -m mixtral_run VERB`, and the program `mixtral-run`."""

import sys

from mixtral_run.launch.imports import importing
from mixtral_run.launch.process_exit import end_at_once
from mixtral_run.terminal.streams import open_closed_streams


def main() -> None:
    """Run the command line, see cli/main.py."""
    open_closed_streams()
    with importing():
        from mixtral_run.cli.main import main as run
    try:
        run()
    except SystemExit as ended:
        processes = sys.modules.get("mixtral_run.launch.processes")
        if processes is not None and processes.has_fork_server():
            end_at_once(ended.code, sys._getframe(1))
        raise


if __name__ == "__main__":
    main()

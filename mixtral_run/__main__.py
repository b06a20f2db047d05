"""`python -m mixtral_run VERB`, `torchrun … -m mixtral_run VERB`, and the program `mixtral-run`."""

import sys

from mixtral_run.launch.imports import importing
from mixtral_run.launch.process_exit import end_at_once


def main() -> None:
    """Run the command line, see cli/main.py."""
    with importing():
        from mixtral_run.cli.main import main as run
    try:
        run()
    except SystemExit as ended:
        processes = sys.modules.get("mixtral_run.launch.processes")
        if processes is not None and processes.has_fork_server():
            end_at_once(ended.code)
        raise


if __name__ == "__main__":
    main()

"""Errors under a torchrun that the user started: each one is printed once on a host, and torchrun adds nothing to it.

The processes agree through the folder that torchrun makes for them. torchrun itself loads `rendezvous_handler` when it
starts, by the entry point group `torchrun.handlers`; if it runs `-m mixtral_run`, its summary of failed processes is
hidden where the kit has reported the error, and its exit code becomes the kit's. Standard library only.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from mixtral_run.errors import EXIT_CODES, Stopped

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable of torchrun's processes: FOLDER/LOCAL_RANK/error.json, in a folder of this attempt."""
WAIT_SECONDS = 5.0
"""Longest time that a process waits for another one to print their common error."""
REPORTED_EXIT_CODES = {*EXIT_CODES, Stopped.exit_code} - {1}
"""Exit codes of a process that has reported its error. Python exits with 1 after a traceback."""
_AGENT_LOGGER = "torch.distributed.elastic.multiprocessing.api"


def print_once(message: str) -> bool:
    """Print `message` to stderr unless another process of this torchrun on this host prints it.

    Return after it was printed: torchrun ends all processes once the first one has ended. Return False, and print
    nothing, if torchrun did not start this process or its folder cannot be written to.
    """
    error_file = os.environ.get(ERROR_FILE_VARIABLE)
    if not error_file:
        return False
    digest = hashlib.sha256(message.encode()).hexdigest()[:16]
    claim = Path(error_file).parent.parent / f"mixtral-run-{digest}"
    printed = claim.with_suffix(".printed")
    try:
        claim.touch(mode=0o600, exist_ok=False)
    except FileExistsError:
        until = time.monotonic() + WAIT_SECONDS
        while not printed.exists() and time.monotonic() < until:
            time.sleep(0.02)
        return True
    except OSError:
        return False
    print(message, file=sys.stderr, flush=True)
    printed.touch()
    return True


def rendezvous_handler() -> Any:
    """Hide torchrun's summary if this is a torchrun that runs the kit. Return a handler that nobody may select."""
    if runs_the_kit(sys.argv):
        _hide_summaries()
    return _no_handler


def _no_handler(parameters: object) -> NoReturn:
    raise ValueError(f"mixtral_run is not a rendezvous backend: {parameters}")


def runs_the_kit(argv: Sequence[str]) -> bool:
    """Return True for the arguments of `torchrun … -m mixtral_run …`."""
    return any(
        word in ("-m", "--module") and following == "mixtral_run" for word, following in itertools.pairwise(argv)
    )


def exit_code_of(failure: object) -> int | None:
    """Return the exit code of the first process in torch's ChildFailedError that reported its error.

    Return None if there is none, or if a signal other than torchrun's SIGTERM ended a process: nobody reported that.
    """
    if type(failure).__name__ != "ChildFailedError":
        return None
    failures = sorted(getattr(failure, "failures", {}).values(), key=lambda each: each.timestamp)
    if any(each.exitcode < 0 and each.exitcode != -signal.SIGTERM for each in failures):
        return None
    return next((each.exitcode for each in failures if each.exitcode in REPORTED_EXIT_CODES), None)


def _hide_summaries() -> None:
    logging.getLogger(_AGENT_LOGGER).addFilter(_is_worth_showing)
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        code = exit_code_of(error)
        if code is None:
            shown(kind, error, trace)
        else:
            sys.exit(code)

    sys.excepthook = hook


def _is_worth_showing(record: logging.LogRecord) -> bool:
    """Return False for what torchrun logs when a process has failed with an error that it reported."""
    text = record.getMessage()
    failed = re.match(r"failed \(exitcode: (-?\d+)\)", text)
    if failed:
        return int(failed[1]) not in REPORTED_EXIT_CODES
    return not text.startswith(("Sending process", "Closing process"))

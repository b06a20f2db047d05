"""Functions that run programs on the host from an argument list, never by a shell, and always with a time limit."""

from __future__ import annotations

import os
import subprocess
from collections import namedtuple

Result = namedtuple("Result", "code out err")
MISSING = 127
TIMED_OUT = 124


def run(argv, timeout=60, stdin=None, environment=None):
    """Run a program and return its exit code and output. 127: it is not installed; 124: it exceeded `timeout` seconds.

    The limit is needed because nvidia-smi hangs forever on a failed driver.
    """
    env = dict(os.environ, LC_ALL="C", DEBIAN_FRONTEND="noninteractive")
    env["PATH"] = env.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"
    env.update(environment or {})
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            stdin=None if stdin is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError:
        return Result(MISSING, "", "{}: not installed".format(argv[0]))
    except PermissionError:
        # Also where a folder of PATH is closed to this user, and the program is in no other one.
        return Result(MISSING, "", "{}: not installed, or this user may not run it".format(argv[0]))
    except subprocess.TimeoutExpired:
        return Result(TIMED_OUT, "", "{}: no answer within {} s".format(argv[0], timeout))
    return Result(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))


def last_lines(result, count=8):
    """Return the last `count` lines of a program's output, for a message."""
    lines = (result.out + "\n" + result.err).strip().splitlines()
    return "\n".join(line.rstrip() for line in lines[-count:])

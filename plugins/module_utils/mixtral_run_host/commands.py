"""Running programs on the host: argv only, never a shell, always with a limit."""

from __future__ import annotations

import os
import subprocess
from collections import namedtuple

Result = namedtuple("Result", "code out err")
MISSING = 127
TIMED_OUT = 124


def run(argv, timeout=60, stdin=None, environment=None):
    """Run a program; returns its exit code and texts. 127: there is none; 124: it ran past `timeout` seconds.

    A sick driver can hang nvidia-smi for ever: whoever reads a host must come back.
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
    except subprocess.TimeoutExpired:
        return Result(TIMED_OUT, "", "{}: no answer within {} s".format(argv[0], timeout))
    return Result(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))


def last_lines(result, count=8):
    """The end of what a program printed, for a message."""
    lines = (result.out + "\n" + result.err).strip().splitlines()
    return "\n".join(line.rstrip() for line in lines[-count:])

"""Run Python's arguments in a fork of the warm server: `python -I -S forked_python.py SOCKET ARGUMENT …`.

Signals are passed on. The exit code is that of the fork, which the server kills when this process has died.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from types import FrameType

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    folder = os.getcwd()  # noqa: PTH109 - the import of pathlib takes as long as all others
    words = {"argv": sys.argv[2:], "cwd": folder, "env": dict(os.environ), "tied": True}
    request = json.dumps(words).encode() + b"\n"
    sent = socket.send_fds(connection, [request], [0, 1, 2])
    connection.sendall(request[sent:])
    answers = connection.makefile("rb", buffering=0)
    pid = json.loads(answers.readline())["pid"]

    def pass_on(number: int, _: FrameType | None) -> None:
        os.kill(pid, number)

    for each in PASSED_ON:
        signal.signal(each, pass_on)
    status = json.loads(answers.readline())["status"]
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main()

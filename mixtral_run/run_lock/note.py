"""The note in a lock's file: who holds the lock, and a counter that changes while the holder lives."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

LARGEST_NOTE = 4096
TO_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
"""Flags to open a lock's file for reading. Without O_NONBLOCK, opening a pipe in its place would never end."""
_COUNTER_DIGITS = 12


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock. since: UTC, ISO 8601. remove: command that removes the lock of a lost host."""

    command: str
    host: str
    pid: int
    since: str
    remove: str = ""

    @classmethod
    def this_process(cls, command: str) -> Holder:
        """Describe this process. command: such as `mixtral-run finetune`."""
        return cls(command, socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def __str__(self) -> str:
        return f"{self.command}, process {self.pid} on {self.host}, since {self.since}"

    @property
    def how_to_end(self) -> str:
        """Return the command that asks the holder to end."""
        kill = f"kill {self.pid}"
        return kill if self.host == socket.gethostname() else f"{kill} on {self.host}"

    @property
    def if_lost(self) -> str:
        """Return what to do if the holder's host is lost, to end a sentence with; nothing for a holder of this host."""
        return f"; if it is certain that its host is lost: {self.remove}" if self.remove else ""


UNKNOWN = Holder("another process", "an unknown host", 0, "an unknown time")


def removal_of(lock: Path) -> str:
    """Return the command that removes a lock."""
    return f"rm {shlex.quote(str(lock))}"


def boot_id() -> str:
    """Return a text that the containers of one running host share, and that no other host has; "" if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


@dataclass(frozen=True)
class Note:
    """A holder with the boot of its host and the token of its lock, which no other lock has."""

    holder: Holder
    boot: str = field(default_factory=boot_id)
    token: str = field(default_factory=lambda: secrets.token_hex(16))

    def to_bytes(self, counter: int) -> bytes:
        """Return the content of the file. Its size is the same for each counter, so that it is written in place."""
        holder = self.holder
        values = {"command": holder.command, "host": holder.host, "pid": holder.pid, "since": holder.since}
        own = {"boot": self.boot, "token": self.token, "counter": f"{counter:0{_COUNTER_DIGITS}d}"}
        return json.dumps(values | own).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Note:
        """Read the content of a lock's file. Anybody may have written it: in another form it names nobody."""
        try:
            values = json.loads(content)
            texts = [values[name] for name in ("command", "host", "since")]
            own = [values.get(name, "") for name in ("boot", "token")]
            pid = values["pid"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls(UNKNOWN, "", "")
        if not all(isinstance(each, str) and each.isprintable() and len(each) < 200 for each in (*texts, *own)):
            return cls(UNKNOWN, "", "")
        if type(pid) is not int or pid <= 0:
            return cls(UNKNOWN, "", "")
        return cls(Holder(texts[0], texts[1], pid, texts[2]), *own)

    @property
    def is_of_this_host(self) -> bool:
        """Return True for a holder on this host since its boot. Two hosts may have one name."""
        return self.holder.host == socket.gethostname() and self.boot in ("", boot_id())


def read_note(descriptor: int) -> Note:
    """Return the note of an open lock."""
    try:
        return Note.from_bytes(os.pread(descriptor, LARGEST_NOTE, 0))
    except OSError:
        return Note(UNKNOWN, "", "")

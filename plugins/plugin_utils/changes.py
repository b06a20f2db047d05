"""Tasks that changed something, by host, in the memory of Ansible's main process.

The callback `changed_tasks` adds to them there. Ansible forks a worker for each task, which sees them as they are then.
"""

from __future__ import annotations

_changed: dict[str, list[str]] = {}
_watching = False


def watch() -> None:
    """Note that the callback is enabled: no change then means that nothing changed."""
    global _watching
    _watching = True


def add(host: str, task: str) -> None:
    """Add a task that changed something on a host."""
    _changed.setdefault(host, []).append(task)


def changed(host: str) -> list[str] | None:
    """Return the tasks that changed something on a host, in order; None if nobody watches."""
    return _changed.get(host, []) if _watching else None

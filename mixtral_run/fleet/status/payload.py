"""Programs that run on a host without being installed there: one Python text, sent to `python3 -` over SSH."""

from __future__ import annotations

import json
from pathlib import Path

from mixtral_run.fleet.plays.provisioning import provisioning_folder

# Runs on the host before anything else: hands out the sources below as modules.
_LOADER = """
import sys, types
def _load(sources):
    for name in sorted(sources, key=lambda each: each.count(".")):
        module = types.ModuleType(name)
        module.__path__ = []
        sys.modules[name] = module
    for name, text in sources.items():
        module = sys.modules[name]
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    for name, text in sources.items():
        exec(compile(text, name, "exec"), sys.modules[name].__dict__)
"""

_ORDER = ("files", "commands", "probe")
"""Modules of mixtral_run_host that are sent, each after what it imports."""


def status_payload() -> bytes:
    """The program that prints a host's state: the readings that the roles use, and those of `remote_status`."""
    prefix = "ansible.module_utils.mixtral_run_host"
    folder = provisioning_folder() / "plugins" / "module_utils" / "mixtral_run_host"
    sources = dict.fromkeys(("ansible", "ansible.module_utils", prefix), "")
    sources |= {f"{prefix}.{name}": _read(folder / f"{name}.py") for name in _ORDER}
    program = _read(Path(__file__).with_name("remote_status.py"))
    # `from __future__` has to come first in a program: it stands inside a compiled text of its own.
    return "\n".join(
        (
            _LOADER,
            f"import json; _load(json.loads({json.dumps(json.dumps(sources))}))",
            f'exec(compile({json.dumps(program)}, "remote_status", "exec"), {{"__name__": "__main__"}})',
        )
    ).encode()


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")

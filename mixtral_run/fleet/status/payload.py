"""Program that runs on a host without installation: one Python text for `python3 -` over SSH."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mixtral_run.fleet.plays.provisioning import collection_folder

# Runs first on the host: creates modules from the sources that are sent along.
_LOADER = """
import sys, types
def _load(sources):
    for name in sorted(sources, key=lambda each: each.count(".")):
        module = types.ModuleType(name)
        module.__path__ = []
        module.__package__ = name.rpartition(".")[0]
        sys.modules[name] = module
    for name, text in sources.items():
        module = sys.modules[name]
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    for name, text in sources.items():
        exec(compile(text, name, "exec"), sys.modules[name].__dict__)
"""

_NEEDED = ("commands", "probe", "gpu.gpu_driver", "gpu.gpu_shortfalls", "gpu.since_acceptance")
"""Modules of mixtral_run_host that `remote_status` imports. Those that they import are sent as well."""
_IMPORT = re.compile(r"^ *from (\.+)([\w.]*) import ([\w, ]+)$", re.MULTILINE)


def program_of(sources: dict[str, str], program: str) -> bytes:
    """Return one Python text that creates modules from `sources`, by name, and then runs `program`."""
    # `from __future__` must come first in a program, so this program is compiled separately.
    return "\n".join(
        (
            _LOADER,
            f"import json; _load(json.loads({json.dumps(json.dumps(sources))}))",
            f'exec(compile({json.dumps(program)}, "program", "exec"), {{"__name__": "__main__"}})',
        )
    ).encode()


def status_payload() -> bytes:
    """Return the program that prints a host's state: the readings of the roles and those of `remote_status`."""
    prefix = "ansible.module_utils.mixtral_run_host"
    folder = collection_folder() / "plugins/module_utils/mixtral_run_host"
    modules: dict[str, str] = {}
    for name in _NEEDED:
        _add_module(modules, folder, name)
    folders = {f"{prefix}.{name.rpartition('.')[0]}" for name in modules if "." in name}
    sources = dict.fromkeys(("ansible", "ansible.module_utils", prefix, *sorted(folders)), "")
    sources |= {f"{prefix}.{name}": text for name, text in modules.items()}
    return program_of(sources, _read(Path(__file__).with_name("remote_status.py")))


def _add_module(modules: dict[str, str], folder: Path, name: str) -> None:
    """Add a module's text to `modules`, by its name below `folder`, after those that it imports."""
    if name in modules:
        return
    text = _read(folder / f"{name.replace('.', '/')}.py")
    for dots, module, names in _IMPORT.findall(text):
        target = ".".join([*name.split(".")[: -len(dots)], *([module] if module else [])])
        if (folder / f"{target.replace('.', '/')}.py").is_file():
            _add_module(modules, folder, target)
            continue
        for each in names.split(", "):
            _add_module(modules, folder, f"{target}.{each}" if target else each)
    modules[name] = text


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")

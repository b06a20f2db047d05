"""Lets tests import what runs on the hosts under the names that Ansible gives it there."""

import importlib.util
from pathlib import Path

import ansible.module_utils

ROOT = Path(__file__).parents[3]
ansible.module_utils.__path__.append(str(ROOT / "plugins/module_utils"))


def load_module(name: str):
    """An Ansible module of the kit as a Python module."""
    spec = importlib.util.spec_from_file_location(f"kit_module_{name}", ROOT / f"plugins/modules/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""Lets tests import what runs on the hosts under the names that Ansible gives it there."""

import functools
import importlib.util
import sys
from pathlib import Path
from unittest import mock

import ansible.module_utils
import pytest

intern = sys.intern
from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible.module_utils.testing import patch_module_args  # noqa: E402

# ansible-core puts an object of its own there, which torch's compiler, imported by other tests, does not take.
sys.intern = intern

ROOT = Path(__file__).parents[3]
ansible.module_utils.__path__.append(str(ROOT / "plugins/module_utils"))

from ansible.module_utils.mixtral_run_host.files import Record  # noqa: E402 - found on the path above


def load_module(name: str):
    """An Ansible module of the kit as a Python module."""
    return _load(f"plugins/modules/{name}.py", f"ansible.modules.{name}")


def load_action(name: str):
    """Return an action plugin of the kit as a Python module."""
    return _load(f"plugins/action/{name}.py", f"ansible.plugins.action.{name}")


def _load(path: str, name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Ended(Exception):
    """Result of a module, raised at the moment when the module would end its process."""


def call_module(module, record_folder, check_mode=False, **params):
    """Run an Ansible module in this process, its records in a folder of their own; returns its result."""

    def end(_self, **result):
        raise _Ended(result)

    with (
        patch_module_args({**params, "_ansible_check_mode": check_mode}),
        mock.patch.object(AnsibleModule, "exit_json", end),
        mock.patch.object(AnsibleModule, "fail_json", lambda self, **result: end(self, failed=True, **result)),
        mock.patch.object(module, "Record", functools.partial(Record, folder=str(record_folder)), create=True),
        pytest.raises(_Ended) as ended,
    ):
        module.main()
    return ended.value.args[0]

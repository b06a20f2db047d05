"""Checks the variables of several roles against their argument specs, on the operator's machine, in one task."""

from __future__ import annotations

from pathlib import Path

import yaml
from ansible.errors import AnsibleActionFail
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):
    """What Ansible does at the beginning of each role, done for all at once: all faults are told before one begins."""

    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        faults = []
        for role in self._task.args["roles"]:
            options = _options(Path(self._task.args["folder"]) / role)
            given = self._templar.template({name: task_vars[name] for name in options if name in task_vars})
            checked = ArgumentSpecValidator(options).validate(given, validate_role_argument_spec=True)
            faults += [f"  {role}: {message}" for message in checked.error_messages]
        if faults:
            message = "Variables are not as the roles take them; nothing was changed.\n" + "\n".join(faults)
            return {**result, "failed": True, "msg": message}
        return {**result, "changed": False}


def _options(role):
    path = role / "meta" / "argument_specs.yml"
    if not path.is_file():
        raise AnsibleActionFail(f"role_arguments: there is no {path}")
    # Not by Ansible's loader, which notes for each value where it stands: six times as slow.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)["argument_specs"]["main"]["options"]

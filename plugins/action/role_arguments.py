"""Action plugin that checks the variables of several roles against their argument specs in one task.

It runs on the operator's machine.
"""

from __future__ import annotations

from ansible.plugins.action import ActionBase
from ansible_collections.mixtral_run.hosts.plugins.plugin_utils import role_check


class ActionModule(ActionBase):
    """Argument check that Ansible runs at the start of each role, run for all roles before the first one starts.

    It reports the problems of all roles together, and variables that no role takes.
    """

    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        refused, warning = role_check.check(self._task.args, task_vars, self._templar, self._loader)
        if warning:
            result = {**result, "warnings": [warning]}
        return {**result, "failed": True, "msg": refused} if refused else {**result, "changed": False}

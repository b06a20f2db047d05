"""Action plugin that computes one round of a spread from host to host. It runs on the operator's machine.

Every host that lacks the files computes the same plan from the same reports, so no task is tied to one host.
"""

from __future__ import annotations

from ansible.plugins.action import ActionBase

from ..module_utils.mixtral_run_host.spread.rounds import plan_of
from ..plugin_utils.run_id import run_id


class ActionModule(ActionBase):
    """Plan of the next round, as this host sees it."""

    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        # With these strategies hosts do not wait for each other between tasks.
        waits = self._task.get_play().strategy.rpartition(".")[2] not in ("free", "host_pinned")
        hosts = {name: task_vars["hostvars"].raw_get(name) for name in task_vars["ansible_play_hosts"]}
        plan = plan_of(task_vars["inventory_hostname"], hosts, self._task.args, waits)
        return {**result, "changed": False, "run_id": run_id(), **plan}

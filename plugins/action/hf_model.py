"""Action plugin of `hf_model`, which runs on the operator's machine: it adds which run of Ansible this is."""

from __future__ import annotations

from ansible.plugins.action import ActionBase

from ..plugin_utils.run_id import run_id


class ActionModule(ActionBase):
    """Action that lets a look at a host tell the keys of this run from those that a killed run left."""

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        arguments = {**self._task.args, "run_id": run_id()}
        return {**result, **self._execute_module(module_args=arguments, task_vars=task_vars)}

"""Callback plugin that keeps in mind which tasks changed something on each host, for `host_visit`.

It also makes Ansible's workers cheaper, because a callback is what Ansible loads before it forks the first one.
"""

from __future__ import annotations

import gc
import os

from ansible.plugins.callback import CallbackBase

from ..plugin_utils.changes import add, watch
from ..plugin_utils.kit_version import kit_version

DOCUMENTATION = """
name: changed_tasks
type: aggregate
short_description: Keep in mind which tasks changed something on each host
description:
  - The module C(mixtral_run.hosts.host_visit) writes them into the history of the host. Prints nothing.
  - Switches Python's cyclic garbage collector off in Ansible's workers, each of which lives for one task of one host.
requirements: ["callbacks_enabled = mixtral_run.hosts.changed_tasks in ansible.cfg"]
"""


class CallbackModule(CallbackBase):
    """Callback without output."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "mixtral_run.hosts.changed_tasks"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        watch()
        kit_version()  # asks git once here, and not in each worker
        # It takes half of the time in which a worker puts a module together, and finds nothing worth its search.
        os.register_at_fork(after_in_child=gc.disable)

    def v2_runner_on_ok(self, result):
        if result.result.get("changed"):
            add(result.host.get_name(), result.task.get_name().replace(" : ", " · "))

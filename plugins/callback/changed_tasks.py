"""Callback plugin that keeps in mind which tasks changed something on each host, for `host_visit`.

It also makes Ansible's workers cheaper, because a callback is what Ansible loads before it forks the first one. And it
checks the variables of a play that `--start-at-task` begins in its middle, because no task before that one runs.
"""

from __future__ import annotations

import gc
import os
import sys

from ansible import context
from ansible.plugins.callback import CallbackBase
from ansible.template import Templar

from ..plugin_utils import role_check
from ..plugin_utils.changes import add, watch
from ..plugin_utils.kit_version import kit_version

DOCUMENTATION = """
name: changed_tasks
type: aggregate
short_description: Keep in mind which tasks changed something on each host
description:
  - The module C(mixtral_run.hosts.host_visit) writes them into the history of the host.
  - Runs the check of the task C(mixtral_run.hosts.role_arguments) where C(--start-at-task) leaves it out,
    and ends Ansible if the variables of a host are refused.
  - Prints the C(shown) changes of a task, such as users that it added or owners that it changed.
  - Switches Python's cyclic garbage collector off in Ansible's workers, each of which lives for one task of one host.
requirements: ["callbacks_enabled = mixtral_run.hosts.changed_tasks in ansible.cfg"]
"""


class CallbackModule(CallbackBase):
    """Callback that watches all results, and checks variables with `--start-at-task`."""

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
            # Changes that nobody should miss, such as those of users and owners.
            shown = result.result.get("shown")
            for words in shown if isinstance(shown, list) else ():
                self._display.display(f"{result.host.get_name()}: {_plain(words)}")

    def v2_playbook_on_play_start(self, play):
        if not context.CLIARGS.get("start_at_task"):
            return
        for task in _tasks(play.get_tasks()):
            if task.action == "mixtral_run.hosts.role_arguments":
                self._check(play, dict(task.args))

    def _check(self, play, arguments):
        """End Ansible with the problems of all hosts, each of which is shown once."""
        manager, loader = play.get_variable_manager(), play.get_loader()
        of_play = manager.get_vars(play=play)
        arguments = Templar(loader=loader, variables=of_play).template(arguments)
        alike = {}
        for host in of_play["ansible_play_hosts_all"]:
            variables = {**play.get_vars(), **of_play["hostvars"].raw_get(host)}
            templar = Templar(loader=loader, variables=variables)
            refused, warning = role_check.check(arguments, variables, templar, loader)
            if warning:
                self._display.warning(warning)
            if refused:
                alike.setdefault(refused, []).append(host)
        for refused, hosts in alike.items():
            self._display.error(f"{', '.join(hosts)}: {refused}", wrap_text=False)
        if alike:
            sys.exit(2)


def _plain(text):
    """Return a text of a host on one line without control characters, which would change the terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text))


def _tasks(entries):
    for entry in entries:
        if isinstance(entry, list):
            yield from _tasks(entry)
        elif hasattr(entry, "block"):
            yield from _tasks([*entry.block, *entry.rescue, *entry.always])
        else:
            yield entry

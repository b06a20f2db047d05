"""Action plugin of `host_visit`, which runs on the operator's machine: takes the lock, and knows who does what."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import ansible.constants
from ansible.plugins.action import ActionBase
from ansible_collections.mixtral_run.hosts.plugins.plugin_utils import changes, kit_version, setup_lock
from ansible_collections.mixtral_run.hosts.plugins.plugin_utils.run_id import run_id

MOST_TASKS, LONGEST_TASK = 60, 100
NO_RESULT = "Module result deserialization failed"
"""Ansible's words for a module whose output is no JSON."""


class ActionModule(ActionBase):
    """Action that writes the begin or the end of a run into the history of a host."""

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        if self._task.check_mode:
            return {**result, "changed": False}
        arguments = dict(self._task.args)
        host = task_vars["inventory_hostname"]
        began = arguments["state"] == "began"
        file = _lock_file(host)
        warnings = []
        if began and arguments.get("lock", True):
            refused, warning = setup_lock.take(self._connection, file, f"mixtral-run {arguments['verb']}")
            if refused:
                return {**result, "failed": True, "msg": _refusal(host, refused)}
            warnings += [warning] if warning else []
        lost = None if began else setup_lock.lost_to(file)
        if lost and not arguments.get("failed"):
            arguments["failed"] = "the lock of the host was lost"
        entry = _entry(host, arguments, task_vars)
        answer = self._execute_module(module_args={**arguments, "entry": entry}, task_vars=task_vars)
        if not began:
            setup_lock.give_back(file)
        if answer.get("unreachable"):
            return {**result, **answer}
        if answer.get("failed"):
            # A full disk must not keep a host from its repair.
            warnings.append(f"The history of this host was not written: {_why(answer)}")
        if lost:
            return {**result, "failed": True, "msg": _loss(host, lost), "warnings": warnings}
        return {**result, "changed": False, "warnings": warnings} if warnings else {**result, "changed": False}


def _why(answer):
    """Return why the module failed. The first task that fails explains what a host prints in place of a result."""
    if NO_RESULT not in str(answer.get("msg", "")):
        return answer.get("msg", "")
    said = f"{answer.get('module_stderr', '')}{answer.get('module_stdout', '')}".split()
    return f"the host printed this in place of a result: {' '.join(said)[:LONGEST_TASK]}"


def _refusal(host, holder):
    return (
        f"Another operator changes {host} now.\n  found:    {holder}\n"
        "  next:     wait for it to end, then the same command"
    )


def _loss(host, holder):
    return (
        f"Another operator took the lock of {host} while this run changed it, after the connection had been cut.\n"
        f"  found:    {holder}\n"
        "  next:     wait for it to end, then the same command, because both runs may have changed the host"
    )


def _entry(host, arguments, task_vars):
    """Return the line for the history: names of tasks, and no values of variables."""
    user, machine = setup_lock.operator()
    tags = [str(tag) for tag in task_vars.get("ansible_run_tags", ()) if tag != "all"]
    values = {
        "run": run_id(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "by": f"{user}@{machine}",
        "kit": kit_version.kit_version(),
        "verb": arguments["verb"],
        "tags": tags[:20],
        "state": arguments["state"],
    }
    if arguments["state"] == "ended":
        changed = changes.changed(host)
        values["outcome"] = "failed" if arguments.get("failed") else "done"
        values["failed"] = str(arguments.get("failed", ""))[:LONGEST_TASK]
        values["num_changed"] = None if changed is None else len(changed)
        values["changed"] = [task[:LONGEST_TASK] for task in (changed or ())[:MOST_TASKS]]
    return json.dumps(values, ensure_ascii=True)


def _lock_file(host):
    """Return the file for the lock of a host in the folder that Ansible removes at its end."""
    name = hashlib.sha256(host.encode()).hexdigest()[:16]
    return Path(ansible.constants.DEFAULT_LOCAL_TMP, f"mixtral-run-lock-{name}")

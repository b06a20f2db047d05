#!/usr/bin/python
"""Record the begin and the end of a run in the history of the host."""

from __future__ import annotations

DOCUMENTATION = """
module: host_visit
short_description: Keep two operators apart, and record who changed what and when
description:
  - C(began) takes the lock of the host, which C(mixtral-run bootstrap) and C(teardown) hold as well, and fails with the
    name of the holder if another operator has it. The lock ends with C(ended), with the run, and when the connection is
    cut. Connections other than SSH and local have no lock, which is a warning.
  - Both append a line to /var/log/mixtral-run/history.jsonl. C(ended) records the tasks that changed something, if the
    callback C(mixtral_run.hosts.changed_tasks) is enabled, as in the kit's ansible.cfg.
  - Never reports a change, because a log of visits is no state that a play asks for. Check mode does nothing.
  - The action plugin of the same name does all of it but the writing.
options:
  state: {description: Begin or end of the run., type: str, choices: [began, ended], required: true}
  verb: {description: "What the run does, such as bootstrap.", type: str, required: true}
  failed: {description: "Role and task that failed, with C(ended).", type: str, default: ""}
  lock: {description: "Take the lock. False if the caller holds it.", type: bool, default: true}
  path: {description: File of the history., type: path, default: /var/log/mixtral-run/history.jsonl}
  entry: {description: Line for the history. The action plugin fills it., type: str, default: ""}
"""

from ..module_utils.mixtral_run_host.history import HISTORY, append
from ..module_utils.mixtral_run_host.start import run_module

OPTIONS = {
    "state": {"type": "str", "choices": ["began", "ended"], "required": True},
    "verb": {"type": "str", "required": True},
    "failed": {"type": "str", "default": ""},
    "lock": {"type": "bool", "default": True},
    "path": {"type": "path", "default": HISTORY},
    "entry": {"type": "str", "default": ""},
}


def main():
    run_module(act, OPTIONS)


def act(module):
    if not module.check_mode:
        append(module.params["entry"], module.params["path"])
    module.exit_json(changed=False)


if __name__ == "__main__":
    main()

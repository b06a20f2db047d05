#!/usr/bin/python
"""Take several steps on a host in one process."""

from __future__ import annotations

DOCUMENTATION = """
module: host_steps
short_description: Take several steps on a host in one process
description:
  - A module's start costs a connection, sudo and a Python that compiles Ansible's part of the module, ten times what most
    steps need to find that nothing is to do. Steps that belong together share one start.
  - Steps are taken in order. The first that fails ends it, and those before it stay as they are.
options:
  present:
    description: >-
      Steps for state C(present), each with C(name) and one key of C(apt_source), C(apt_packages), C(daemon_json),
      C(docker_engine) or C(nvidia_runtime), which holds its options.
    type: list
    elements: dict
    required: true
  absent: {description: "Steps for state C(absent), likewise.", type: list, elements: dict, required: true}
  state: {description: Which of the two lists., type: str, choices: [present, absent], required: true}
"""
RETURN = """
steps:
  description: What each step that was taken told, with C(name) and C(changed).
  type: list
  returned: always
step:
  description: Name of the step that failed.
  type: str
  returned: on failure
"""

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.mixtral_run_host import step
from ansible.module_utils.mixtral_run_host.steps import (
    apt_packages,
    apt_source,
    daemon_json,
    docker_engine,
    nvidia_runtime,
)

KINDS = {
    "apt_packages": apt_packages,
    "apt_source": apt_source,
    "daemon_json": daemon_json,
    "docker_engine": docker_engine,
    "nvidia_runtime": nvidia_runtime,
}


def main():
    module = AnsibleModule(
        argument_spec={
            "present": {"type": "list", "elements": "dict", "required": True},
            "absent": {"type": "list", "elements": "dict", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "required": True},
        },
        supports_check_mode=True,
    )
    wanted = [_known(module, each) for each in module.params[module.params["state"]]]
    told, diffs = [], []
    for name, kind, options in wanted:
        result = step.run(KINDS[kind], options, module.check_mode, module.warn)
        diff = result.pop("diff", None)
        if result.pop("failed", False):
            module.fail_json(step=name, steps=told, diff=diffs, **result)
        if result["changed"] and diff:
            diffs.append(diff)
        told.append(dict(result, name=name))
    module.exit_json(changed=any(each["changed"] for each in told), steps=told, diff=diffs)


def _known(module, each):
    """(name, kind, options) of a step as the task gives it."""
    kinds = [key for key in each if key != "name"]
    if "name" not in each or len(kinds) != 1 or kinds[0] not in KINDS:
        module.fail_json(
            msg="A step has a name and one of {}; found {}".format(", ".join(sorted(KINDS)), ", ".join(sorted(each)))
        )
    return each["name"], kinds[0], each[kinds[0]]


if __name__ == "__main__":
    main()

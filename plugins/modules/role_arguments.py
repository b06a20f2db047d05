#!/usr/bin/python
"""Documentation of the action plugin of the same name, which runs on the operator's machine only."""

from __future__ import annotations

DOCUMENTATION = """
module: role_arguments
short_description: Check the variables of several roles against their argument specs
description:
  - Runs the check that Ansible runs at the start of each role for all roles in one task, and reports all problems
    together. Roles that are imported after it need no C(rolespec_validate).
  - A variable that no role takes, and that no template of another variable names, is refused if it is a misspelling of
    a setting. If it only has the prefix of a role in O(folder), it is a warning. Names in the list
    C(mixtral_own_variables) are left alone.
  - The callback C(mixtral_run.hosts.changed_tasks) runs the check where C(--start-at-task) leaves the task out.
options:
  roles: {description: Names of the roles., type: list, elements: str, required: true}
  folder: {description: Folder that contains the roles., type: path, required: true}
  extra_vars:
    description: Warn of each unused variable of C(--extra-vars), also without the prefix of a role.
    type: bool
    default: false
"""

#!/usr/bin/python
"""Documentation of the action plugin of the same name, which runs on the operator's machine only."""

from __future__ import annotations

DOCUMENTATION = """
module: role_arguments
short_description: Check the variables of several roles against their argument specs
description:
  - Runs the check that Ansible runs at the start of each role for all roles in one task, and reports all problems
    together. Roles that are imported after it need no C(rolespec_validate).
options:
  roles: {description: Names of the roles., type: list, elements: str, required: true}
  folder: {description: Folder that contains the roles., type: path, required: true}
"""

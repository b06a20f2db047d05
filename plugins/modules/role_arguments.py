#!/usr/bin/python
"""Documents the action plugin of the same name, which runs on the operator's machine alone."""

from __future__ import annotations

DOCUMENTATION = """
module: role_arguments
short_description: Check the variables of several roles against their argument specs
description:
  - Does for all roles at once what Ansible does at the beginning of each, in one task instead of one a role, and tells all
    faults together. Roles that are imported after it need no C(rolespec_validate).
options:
  roles: {description: Names of the roles., type: list, elements: str, required: true}
  folder: {description: Where the roles are., type: path, required: true}
"""

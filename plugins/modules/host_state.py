#!/usr/bin/python
"""Read a host's whole state in one task."""

from __future__ import annotations

DOCUMENTATION = """
module: host_state
short_description: Read a host's whole state in one task
description:
  - Reads the system, GPUs, driver, fabric manager, memory, disks, engine, toolkit, images, swap and the kit's records.
  - Changes nothing, works in check mode, and returns even if the driver of the host hangs.
options:
  disks:
    description: Folders for which the free space of the filesystem is reported.
    type: list
    elements: path
    default: []
"""
RETURN = """
ansible_facts:
  description: State of the host, under C(mixtral_run).
  type: dict
  returned: always
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.mixtral_run_host import probe


def main():
    module = AnsibleModule(
        argument_spec={"disks": {"type": "list", "elements": "path", "default": []}},
        supports_check_mode=True,
    )
    module.exit_json(changed=False, ansible_facts={"mixtral_run": probe.host(module.params["disks"])})


if __name__ == "__main__":
    main()

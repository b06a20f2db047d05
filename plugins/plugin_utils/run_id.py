"""The name of one run of Ansible, which all its plays, hosts and tasks share."""

from __future__ import annotations

from pathlib import Path

import ansible.constants


def run_id() -> str:
    """Return letters, digits and underscores that no other run on this machine has."""
    return Path(ansible.constants.DEFAULT_LOCAL_TMP).name.rpartition("-")[2]

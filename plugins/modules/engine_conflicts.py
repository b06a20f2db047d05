#!/usr/bin/python
"""Compare the Docker engine that a host has with the kit's settings, before anything is changed."""

from __future__ import annotations

DOCUMENTATION = """
module: engine_conflicts
short_description: Compare the Docker engine that a host has with the settings that it will get
description:
  - Fails with all conflicts at once, also in check mode, and changes nothing.
  - A conflict is a flag of the unit that contradicts a setting, a setting that is in daemon.json and in the unit, a unit
    that starts the program of a package which is removed, another data-root with stored images, Docker from snap, a
    daemon.json that is no JSON object or that cannot be written, or a user that does not exist.
  - Rootless Docker of a user, and packages of the host that the role will replace, are warnings.
options:
  section: {description: Name under which M(daemon_json) records its settings., type: str, required: true}
  settings: {description: As in M(daemon_json)., type: dict, default: {}}
  defaults: {description: As in M(daemon_json)., type: dict, default: {}}
  needed: {description: As in M(daemon_json)., type: dict, default: {}}
  conflicting: {description: Packages that are removed because they conflict with the kit's., type: list, elements: str, default: []}
  users: {description: Users that the role will add to the docker group., type: list, elements: str, default: []}
  unusable: {description: Names of settings whose values would leave their line in a unit., type: list, elements: str, default: []}
  config_files: {description: Files of the host that are kept when packages are replaced., type: list, elements: path, default: []}
  restore: {description: The replaced packages are put back when the role is taken back., type: bool, default: true}
  path: {description: Path of daemon.json., type: path, default: /etc/docker/daemon.json}
"""

from ..module_utils.mixtral_run_host.engine import engine_unit
from ..module_utils.mixtral_run_host.files import Record
from ..module_utils.mixtral_run_host.start import run_module

OPTIONS = {
    "section": {"type": "str", "required": True},
    "settings": {"type": "dict", "default": {}},
    "defaults": {"type": "dict", "default": {}},
    "needed": {"type": "dict", "default": {}},
    "conflicting": {"type": "list", "elements": "str", "default": []},
    "users": {"type": "list", "elements": "str", "default": []},
    "unusable": {"type": "list", "elements": "str", "default": []},
    "config_files": {"type": "list", "elements": "path", "default": []},
    "restore": {"type": "bool", "default": True},
    "path": {"type": "path", "default": "/etc/docker/daemon.json"},
}


def main():
    run_module(act, OPTIONS)


def act(module):
    params = module.params
    owned = Record("daemon_json").values.get("sections", {}).get(params["section"], [])
    found, kept = engine_unit.conflicts(params, owned)
    for level, expected, seen, step in found:
        if level == "warn":
            module.warn("Docker: expected {}; found {}; {}".format(expected, seen, step))
    failures = [each for each in found if each[0] == "fail"]
    if failures:
        lines = ["  - expected {1}; found {2}\n    next: {3}".format(*each) for each in failures]
        module.fail_json(
            msg="The engine of this host contradicts the role's settings; nothing was changed.\n" + "\n".join(lines),
            conflicts=failures,
        )
    announced = engine_unit.announcements(found)
    module.exit_json(changed=False, kept=kept, announcements=announced)


if __name__ == "__main__":
    main()

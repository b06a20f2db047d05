#!/usr/bin/python
"""Merge settings into Docker's daemon.json and record which of them belong to the kit."""

from __future__ import annotations

DOCUMENTATION = """
module: daemon_json
short_description: Merge settings into Docker's daemon.json and record which belong to the kit
description:
  - Merges recursively and keeps the settings of the host. Writes the file only if it changes, with a backup, after the
    engine has validated it. Records whether a reload or a restart is due, which M(docker_engine) then performs.
  - A setting on the command line of the engine's unit is not repeated in the file, because the engine would not start.
    If it contradicts C(settings), the module fails and changes nothing, also in check mode.
  - Link, mode, owner, group and extended attributes of the file stay.
options:
  section:
    description: Name under which the settings are recorded. Each section removes only its own settings.
    type: str
    required: true
  settings:
    description: Settings of this section. They replace values of the host.
    type: dict
    default: {}
  defaults:
    description: Settings that the host's own values override.
    type: dict
    default: {}
  needed:
    description: Settings that are refused if the host has another value, because replacing it would hide stored data.
    type: dict
    default: {}
  state:
    description: C(absent) removes the settings of the section.
    type: str
    choices: [present, absent]
    default: present
  path:
    description: Path of the file.
    type: path
    default: /etc/docker/daemon.json
"""
RETURN = """
due:
  description: "Action that the engine needs: C(none), C(reload) or C(restart)."
  type: str
  returned: always
kept:
  description: Settings of the host that stay instead of C(defaults).
  type: list
  returned: always
keys:
  description: Top-level keys that changed.
  type: list
  returned: always
"""

import copy
import json
import os
import stat
import tempfile

from ..module_utils.mixtral_run_host.commands import MISSING, last_lines, run
from ..module_utils.mixtral_run_host.engine import daemon_settings, engine_flags, engine_unit, settings_file
from ..module_utils.mixtral_run_host.files import Record, explain, remove, rewrite, write_text
from ..module_utils.mixtral_run_host.start import run_module

OPTIONS = {
    "section": {"type": "str", "required": True},
    "settings": {"type": "dict", "default": {}},
    "defaults": {"type": "dict", "default": {}},
    "needed": {"type": "dict", "default": {}},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "path": {"type": "path", "default": "/etc/docker/daemon.json"},
}


def main():
    run_module(act, OPTIONS)


def act(module):
    params, path = module.params, module.params["path"]
    current, text = _parse(module, path)
    record = Record("daemon_json", check_mode=module.check_mode)
    sections = record.values.setdefault("sections", {})
    before = copy.deepcopy(sections)
    argv = engine_unit.unit()["argv"][1:]
    wanted, kept = _wanted(module, current, sections.get(params["section"], []), argv)
    settings, owned = daemon_settings.merge(current, wanted, sections.get(params["section"], []))
    due, keys = daemon_settings.needs(current, settings)
    gone = text is not None and not settings and record.values.get("created", False)
    changed = bool(keys) or gone
    if changed and not module.check_mode:
        _validate(module, path, settings, argv)
        record.values.setdefault("rollback", {"path": path, "text": text, "sections": before})
    _remember(record, params["section"], owned, due, keys, created=text is None)
    if not sections:
        record.values.pop("sections")
    if changed and not module.check_mode:
        # The record is written first. If this run is killed in between, the next run merges again and knows the owner.
        record.save()
        _write(path, text, settings, gone)
    elif not changed:
        record.save()
    after = "" if gone else _dump(settings)
    module.exit_json(
        changed=changed,
        due=due,
        keys=keys,
        kept=kept,
        diff={"before": text or "", "after": after, "before_header": path, "after_header": path},
    )


def _wanted(module, current, owned, argv):
    """Return what to merge, and what of the host's own stays. Fail if the unit or the file contradicts the settings."""
    params = module.params
    if params["state"] == "absent":
        return {}, []
    given = engine_flags.flags(argv)
    defaults = engine_unit.usable_defaults(params["defaults"], current, given)
    settled = engine_flags.settle(params["settings"], defaults, params["needed"], current, owned, given)
    if settled.conflicts:
        lines = ["  - expected {}; found {}\n    next: {}".format(*conflict) for conflict in settled.conflicts]
        module.fail_json(
            msg="The settings contradict those of the engine; nothing was changed.\n" + "\n".join(lines),
            conflicts=settled.conflicts,
        )
    return settled.settings, settled.kept


def _parse(module, path):
    try:
        return settings_file.read_settings(path)
    except settings_file.BadSettings as error:
        module.fail_json(
            msg=explain(
                "Docker's settings file is not usable; it was left as it is.",
                where=path,
                expected=error.expected,
                found=error.found,
                next_step=error.step,
            )
        )


def _remember(record, section, owned, due, keys, created):
    values = record.values
    if owned:
        values["sections"][section] = owned
    else:
        values["sections"].pop(section, None)
    if created and owned:
        values["created"] = True
    if not values["sections"]:
        values.pop("created", None)
    order = ("none", "reload", "restart")
    due = max(values.get("due", "none"), due, key=order.index)
    if due != "none":
        values["due"] = due
        values["keys"] = sorted(set(values.get("keys", [])) | set(keys))


def _validate(module, path, settings, argv):
    if "--validate" not in run(["dockerd", "--help"]).out:
        return  # Docker before 23 has no --validate, and a bare host has no Docker yet.
    with tempfile.NamedTemporaryFile("w", prefix="mixtral-run-daemon-", suffix=".json") as file:
        file.write(_dump(settings))
        file.flush()
        # With the flags of the unit, because the engine refuses what is in both places.
        answer = run(["dockerd", "--validate", "--config-file", file.name] + argv)
    if answer.code not in (0, MISSING):
        module.fail_json(
            msg=explain(
                "The engine refuses the merged settings; {} was left as it is.".format(path),
                where=path,
                expected="settings that `dockerd --validate` accepts",
                found=last_lines(answer, 3),
                next_step="correct docker_daemon_settings, or what the file already holds",
            )
        )


def _write(path, text, settings, gone):
    if text is not None:
        backup = path + ".mixtral-run.bak"
        if not os.path.exists(backup):
            mode = stat.S_IMODE(os.stat(path).st_mode)
            write_text(
                backup, text, mode
            )  # the file as found on the host; removed together with the kit's last section
    if gone:
        remove(path)
    else:
        rewrite(path, _dump(settings))
    if not Record("daemon_json").values.get("sections"):
        remove(path + ".mixtral-run.bak")


def _dump(settings):
    return json.dumps(settings, indent=2) + "\n"


if __name__ == "__main__":
    main()

#!/usr/bin/python
"""Merge settings into Docker's daemon.json and record which of them belong to the kit."""

from __future__ import annotations

DOCUMENTATION = """
module: daemon_json
short_description: Merge settings into Docker's daemon.json and record which belong to the kit
description:
  - Merges recursively and keeps the settings of the host. Writes the file only if it changes, with a backup, after the
    engine has validated it. Records whether a reload or a restart is due, which M(docker_engine) then performs.
options:
  section:
    description: Name under which the settings are recorded. Each section removes only its own settings.
    type: str
    required: true
  settings:
    description: Settings of this section.
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
keys:
  description: Top-level keys that changed.
  type: list
  returned: always
"""

import json
import os
import tempfile

from ansible.module_utils.mixtral_run_host import daemon_settings
from ansible.module_utils.mixtral_run_host.commands import MISSING, last_lines, run
from ansible.module_utils.mixtral_run_host.files import Record, explain, read_text, remove, write_text
from ansible.module_utils.mixtral_run_host.start import run_module

OPTIONS = {
    "section": {"type": "str", "required": True},
    "settings": {"type": "dict", "default": {}},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "path": {"type": "path", "default": "/etc/docker/daemon.json"},
}


def main():
    run_module(act, OPTIONS)


def act(module):
    params = module.params
    text = read_text(params["path"])
    current = _parse(module, params["path"], text)
    record = Record("daemon_json", check_mode=module.check_mode)
    sections = record.values.setdefault("sections", {})
    wanted = params["settings"] if params["state"] == "present" else {}
    settings, owned = daemon_settings.merge(current, wanted, sections.get(params["section"], []))
    due, keys = daemon_settings.needs(current, settings)
    gone = text is not None and not settings and record.values.get("created", False)
    changed = bool(keys) or gone
    if changed and not module.check_mode:
        _validate(module, params["path"], settings)
    _remember(record, params["section"], owned, due, keys, created=text is None)
    if not sections:
        record.values.pop("sections")
    if changed and not module.check_mode:
        # The record is written first. If this run is killed in between, the next run merges again and knows the owner.
        record.save()
        _write(params["path"], text, settings, gone)
    elif not changed:
        record.save()
    after = "" if gone else _dump(settings)
    module.exit_json(
        changed=changed,
        due=due,
        keys=keys,
        diff={"before": text or "", "after": after, "before_header": params["path"], "after_header": params["path"]},
    )


def _parse(module, path, text):
    try:
        current = json.loads(text) if text and text.strip() else {}
    except ValueError as error:
        module.fail_json(
            msg=explain(
                "Docker's settings file is not valid JSON; it was left as it is.",
                where=path,
                expected="a JSON object",
                found=str(error),
                next_step="correct it by hand (the engine cannot read it either), then run again",
            )
        )
    if not isinstance(current, dict):
        module.fail_json(msg=explain("Docker's settings file must hold a JSON object.", where=path, found=str(current)))
    return current


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


def _validate(module, path, settings):
    if "--validate" not in run(["dockerd", "--help"]).out:
        return  # Docker before 23 has no --validate, and a bare host has no Docker yet.
    with tempfile.NamedTemporaryFile("w", prefix="mixtral-run-daemon-", suffix=".json") as file:
        file.write(_dump(settings))
        file.flush()
        answer = run(["dockerd", "--validate", "--config-file", file.name])
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
            write_text(backup, text)  # the file as found on the host; removed together with the kit's last section
    if gone:
        remove(path)
    else:
        write_text(path, _dump(settings))
    if not Record("daemon_json").values.get("sections"):
        remove(path + ".mixtral-run.bak")


def _dump(settings):
    return json.dumps(settings, indent=2) + "\n"


if __name__ == "__main__":
    main()

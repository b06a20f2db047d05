"""Action plugin that checks the variables of several roles against their argument specs in one task.

It runs on the operator's machine.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from ansible.errors import AnsibleActionFail
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):
    """Argument check that Ansible runs at the start of each role, run for all roles before the first one starts.

    It reports the problems of all roles together.
    """

    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        problems = []
        for role in self._task.args["roles"]:
            options = _options(Path(self._task.args["folder"]) / role)
            given = self._templar.template({name: task_vars[name] for name in options if name in task_vars})
            checked = ArgumentSpecValidator(options).validate(given, validate_role_argument_spec=True)
            problems += [f"  - {role}: {words}" for words in _dicts_as_text(given, options)]
            problems += [f"  - {role}: {_plain(message, given, options)}" for message in checked.error_messages]
        if problems:
            problems.append(
                "  next: correct them where they are set, in the inventory, group_vars or -e; see the role's README"
            )
            message = "Variables are not as the roles take them; nothing was changed.\n" + "\n".join(problems)
            return {**result, "failed": True, "msg": message}
        return {**result, "changed": False}


def _dicts_as_text(given, options):
    """Return a problem for each dict that is given as text, which the roles could not merge with other settings.

    Numbers and booleans may be text: `-e NAME=VALUE` passes nothing else, and the roles convert them.
    """
    return [
        f"{name}: expected a dict; found the text {given[name]!r}; give it as JSON: -e '{{\"{name}\": {{…}}}}'"
        for name in given
        if options[name]["type"] == "dict" and isinstance(given[name], str)
    ]


_OF_ANOTHER_TYPE = re.compile(r"argument '(\w+)' is of type (\S+) and we were unable to convert to (\w+)")


def _plain(message, given, options):
    """Return Ansible's message. For a value of the wrong type, name the variable, the expected type and the value.

    Ansible's own message for a wrong type names its internal classes and omits the value.
    """
    other = _OF_ANOTHER_TYPE.match(message)
    if other is None:
        return message
    name, found, expected = other.groups()
    reported = found if options[name].get("no_log") else f"{given[name]!r}"
    return f"{name}: expected {expected}; found {reported}"


def _options(role):
    path = role / "meta" / "argument_specs.yml"
    if not path.is_file():
        raise AnsibleActionFail(f"role_arguments: there is no {path}")
    # Ansible's loader records the position of each value and is six times as slow.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)["argument_specs"]["main"]["options"]

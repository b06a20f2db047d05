"""The check of a host's variables against the argument specs of the roles, before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from ansible.errors import AnsibleActionFail
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.utils.vars import load_extra_vars
from ansible_collections.mixtral_run.hosts.plugins.plugin_utils import variable_names

try:
    from ansible._internal._datatag._tags import Origin
except ImportError:  # another version of Ansible: a problem then does not say where the variable is set
    Origin = None

NEXT = "  next: correct them where they are set, in the inventory, group_vars or -e; see the role's README"
NEXT_FOR_OWN = (
    f"\n        a variable of another role of yours that is only like a setting: list it in {variable_names.OWN}"
)
NOT_SETTINGS = ("hostvars", "vars", "groups", "ansible_facts")


def check(arguments, variables, templar, loader):
    """Return (why the variables of a host are refused, what to warn of), of which both may be empty.

    arguments: of the task `role_arguments`. variables: of the host, not resolved.
    """
    folder = Path(arguments["folder"])
    specs = {path.parent.parent.name: _options(path) for path in sorted(folder.glob("*/meta/argument_specs.yml"))}
    problems = []
    for role in arguments["roles"]:
        if role not in specs:
            raise AnsibleActionFail(f"role_arguments: there is no {folder / role / 'meta/argument_specs.yml'}")
        options = specs[role]
        given = templar.template({name: variables[name] for name in options if name in variables})
        checked = ArgumentSpecValidator(options).validate(given, validate_role_argument_spec=True)
        problems += [f"  - {role}: {words}" for words in _dicts_as_text(given, options)]
        problems += [f"  - {role}: {_plain(message, given, options)}" for message in checked.error_messages]
    misspelled, warning = _names(arguments, variables, templar, loader, specs)
    problems += [f"  - {words}" for words in misspelled]
    if not problems:
        return "", warning
    end = NEXT + NEXT_FOR_OWN if misspelled else NEXT
    return "\n".join(["Variables are not as the roles take them; nothing was changed.", *problems, end]), warning


def _names(arguments, variables, templar, loader, specs):
    """Return the lines about misspelled names, and the warning about other names that nothing uses."""
    extra = dict(load_extra_vars(loader)) if arguments.get("extra_vars") else {}
    own = templar.template(variables.get(variable_names.OWN)) or []
    own = own.replace(",", " ").split() if isinstance(own, str) else own
    if not isinstance(own, list):
        return [f"{variable_names.OWN}: expected a list of names; found {own!r}"], ""
    # An inventory may have a number or `on` for a key, which is no variable that a template could name.
    names = [name for name in variables if isinstance(name, str)]
    known = {name for options in specs.values() for name in options} | {str(name) for name in own}
    unused = variable_names.unused_names(names, extra, known, specs, _texts(variables))
    placed = [(each, _origin(each.name, variables, extra)) for each in unused]
    others = [pair for pair in placed if not pair[0].is_misspelled]
    misspelled = [variable_names.misspelled(*pair) for pair in placed if pair[0].is_misspelled]
    return misspelled, variable_names.warning(others) if others else ""


def _texts(variables) -> Iterator[str]:
    pending = [value for name, value in variables.items() if name not in NOT_SETTINGS]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, (list, tuple)):
            pending += value


def _origin(name, variables, extra):
    """Return the file and line where a variable is set, `-e`, or an empty text if that is unknown."""
    key = next((each for each in variables if each == name), name)
    origin = Origin and (Origin.get_tag(variables[name]) or Origin.get_tag(key))
    path = str(origin.path or "") if origin else ""
    # mixtral-run hands the values of -e on in a file of this name.
    if name in extra and (not path or Path(path).name == "extra_vars.json"):
        return "-e"
    if not path:
        return ""
    here = Path.cwd()
    shown = Path(path).relative_to(here) if Path(path).is_relative_to(here) else path
    return f"{shown}:{origin.line_num}" if origin.line_num else str(shown)


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


def _options(path):
    # Ansible's loader records the position of each value and is six times as slow.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)["argument_specs"]["main"]["options"]

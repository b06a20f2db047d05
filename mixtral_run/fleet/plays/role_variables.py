"""Check of the names of `--extra-vars` before any host is contacted. The playbooks check the inventory's as well."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from mixtral_run.errors import ConfigError
from mixtral_run.fleet.plays.provisioning import collection_folder, provisioning_folder, role_names
from mixtral_run.fleet.plays.runner import parse_extra_vars


def refuse_misspelled(extra_vars: Sequence[str]) -> None:
    """Raise ConfigError if a variable is a misspelling of a setting. The playbook warns of others that nothing uses.

    For hosts without an inventory: a variable of an inventory may use the name, which the playbook knows.
    """
    import yaml

    files, values = parse_extra_vars(extra_vars)
    texts = [str(value) for value in values.values()]
    for file in files:
        texts.append(file.read_text(encoding="utf-8", errors="replace"))
        # Ansible's own error is better, and its tags and vaults are more than this loader knows.
        with contextlib.suppress(yaml.YAMLError):
            content = yaml.safe_load(texts[-1])
            values = {**content, **values} if isinstance(content, dict) else values
    checks, roles = _variable_names(), role_names()
    own = _own(values.get(checks.OWN))
    names = [name for name in values if isinstance(name, str) and name not in own]
    problems = [
        checks.misspelled(each, "-e")
        for each in checks.unused_names(names, names, _settings(roles), roles, texts)
        if each.is_misspelled
    ]
    if problems:
        raise ConfigError(
            "Variables are not as the roles take them; nothing was changed.",
            problems=problems,
            next_command=f'correct --extra-vars; or list a name of your own: -e \'{{"{checks.OWN}": ["NAME"]}}\'',
        )


def values_of(extra_vars: Sequence[str]) -> dict[str, Any]:
    """Return the variables of --extra-vars as far as they can be read without Ansible. The last of a name counts."""
    import yaml

    found: dict[str, Any] = {}
    for word in extra_vars:
        files, values = parse_extra_vars((word,))
        for file in files:
            with contextlib.suppress(OSError, yaml.YAMLError):
                content = yaml.safe_load(file.read_text(encoding="utf-8", errors="replace"))
                found |= content if isinstance(content, dict) else {}
        found |= values
    return found


def _own(value: object) -> Sequence[str]:
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    return [str(each) for each in words] if isinstance(words, list) else []


def _settings(roles: Sequence[str]) -> set[str]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found: set[str] = set()
    for role in roles:
        text = (provisioning_folder() / "roles" / role / "meta/argument_specs.yml").read_text(encoding="utf-8")
        found |= yaml.load(text, Loader=loader)["argument_specs"]["main"]["options"].keys()
    return found


def _variable_names() -> ModuleType:
    """Return the check as the playbooks run it. Their plugins are no part of this package."""
    file = collection_folder() / "plugins/plugin_utils/variable_names.py"
    spec = importlib.util.spec_from_file_location("mixtral_run_variable_names", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

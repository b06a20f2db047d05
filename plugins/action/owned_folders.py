"""Action plugin of `owned_folders`, which runs on the operator's machine.

It reads the secrets from files there. The task sees the paths only, so its results need not be hidden: that a secret
changed, or why it cannot be used, stays visible.
"""

from __future__ import annotations

import re
from pathlib import Path

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

HIDDEN = "(secret hidden)"
LEAST_SECRET = 8
"""Characters of the shortest value that is hidden whatever its name is."""
SECRET_NAMES = re.compile("key|secret|token|password", re.IGNORECASE)
FILES = {
    "secret_file": ("secret", "hf_cache_token_file"),
    "keys_file": ("keys", "hf_cache_store_keys_file"),
}
"""Arguments of the task, the module's options that they fill, and the variables of the role that name the files."""


class ActionModule(ActionBase):
    """Action that passes the content of files to the module, whose options hide it in all results."""

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        secrets = []
        for argument, (option, variable) in FILES.items():
            file = arguments.pop(argument, "")
            if file and arguments.get("state", "present") == "present":
                arguments[option] = _text(Path(file).expanduser(), variable)
                secrets += _parts(arguments[option]) if option == "keys" else [arguments[option]]
        answer = self._execute_module(module_args=arguments, task_vars=task_vars)
        return {**result, **_without(answer, [each.strip().strip("'\"") for each in secrets])}


def _parts(text):
    """Return what must not be shown of keys: the values of `NAME = VALUE` or `NAME: VALUE`, and odd lines as a whole.

    A short value of another name, such as a region, is no secret, and may be a part of other words in a message.
    """
    found = []
    for line in map(str.strip, text.splitlines()):
        if line and line[0] not in "#;[":
            name, *rest = re.split("[=:]", line, maxsplit=1)
            value = (rest[0] if rest else line).strip()
            if len(value) >= LEAST_SECRET or (rest and SECRET_NAMES.search(name)):
                found.append(value)
    return found


def _without(answer, secrets):
    """Return the answer of a module with the secrets replaced. A Python that fails on a host may print its input."""
    hidden = {name: value for name, value in answer.items() if isinstance(value, str)}
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        hidden = {name: value.replace(secret, HIDDEN) for name, value in hidden.items()}
    return {**answer, **hidden}


def _text(path, variable):
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise AnsibleActionFail(
            f"The secret cannot be used.\n  where:    {path}\n  expected: text in UTF-8\n"
            "  found:    something else, such as UTF-16\n  next:     save the file as UTF-8"
        ) from None
    except OSError as error:
        raise AnsibleActionFail(
            f"The secret cannot be read on this machine.\n  where:    {path}\n  found:    {error.strerror}\n"
            f"  next:     correct the path of {variable}"
        ) from None
    return text

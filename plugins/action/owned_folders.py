"""Action plugin of `owned_folders`, which runs on the operator's machine.

It reads the secret from a file there. The task sees the path only, so its results need not be hidden: that a secret
changed, or why it cannot be used, stays visible.
"""

from __future__ import annotations

from pathlib import Path

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

HIDDEN = "(secret hidden)"


class ActionModule(ActionBase):
    """Action that passes the content of `secret_file` to the module, whose option `secret` hides it in all results."""

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        file = arguments.pop("secret_file", "")
        if file and arguments.get("state", "present") == "present":
            arguments["secret"] = _text(Path(file).expanduser())
        answer = self._execute_module(module_args=arguments, task_vars=task_vars)
        return {**result, **_without(answer, arguments.get("secret", ""))}


def _without(answer, secret):
    """Return the answer of a module with the secret replaced. A Python that fails on a host may print its input."""
    secret = secret.strip().strip("'\"")
    hidden = {
        name: value.replace(secret, HIDDEN) for name, value in answer.items() if secret and isinstance(value, str)
    }
    return {**answer, **hidden}


def _text(path):
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
            "  next:     correct the path, such as hf_cache_token_file"
        ) from None
    return text

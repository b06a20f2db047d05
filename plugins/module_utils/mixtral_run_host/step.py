"""One step of several that a module runs in one process: its options checked, and its end caught."""

from __future__ import annotations

import os

from ansible.module_utils.common.arg_spec import ArgumentSpecValidator


class _Ended(Exception):
    """How a step ended, where a module of its own would end its process."""

    def __init__(self, result):
        super().__init__()
        self.result = result


class Step:
    """What a step's `main` is given: the part of AnsibleModule that steps use."""

    def __init__(self, params, check_mode, warn):
        self.params, self.check_mode, self.warn = params, check_mode, warn

    def exit_json(self, **result):
        """End the step; `result` is what it tells."""
        raise _Ended(result)

    def fail_json(self, msg, **result):
        """End the step, and with it all that would follow."""
        raise _Ended(dict(result, msg=msg, failed=True))


def run(code, options, check_mode, warn):
    """Run a step; returns its result, with `failed` in it where it failed.

    Options are checked, converted and filled up as AnsibleModule does it. What a step sets in its environment, such as a
    proxy, is gone after it, as it would be with its process.
    """
    checked = ArgumentSpecValidator(code.OPTIONS).validate(options)
    if checked.error_messages:
        return {"failed": True, "msg": "; ".join(checked.error_messages)}
    environment = dict(os.environ)
    try:
        code.main(Step(checked.validated_parameters, check_mode, warn))
    except _Ended as end:
        return end.result
    finally:
        os.environ.clear()
        os.environ.update(environment)
    raise AssertionError("{} ended without a result".format(code.__name__))

#!/usr/bin/python
"""Find the one version that all packages of the NVIDIA driver have in the sources of apt."""

from __future__ import annotations

DOCUMENTATION = """
module: nvidia_driver_version
short_description: Find the one version that all packages of the NVIDIA driver have
description:
  - Returns the version that is installed if it is of the wanted branch or version and no package is missing. Otherwise it
    reads the lists of apt anew (C(refreshed) is true then) and returns the newest version that every package has.
  - A change of the version leaves the loaded module behind until it is replaced, and then no program can use the GPUs. So
    while programs use them, or if the module may not be replaced, nothing is to be installed. C(deferred) is true then, and
    with C(reboot) set to C(ask) the module fails.
  - A pinning package of another version that the kit did not install makes the module fail.
  - In check mode before the repository is known, the version is a pattern such as C(580.*).
options:
  host: {description: Name of the host in messages., type: str, default: ""}
  reload: {description: The loaded modules may be replaced without a reboot., type: bool, default: true}
  reboot: {description: What to do about a reboot that is due., type: str, choices: [never, when_idle, ask], default: ask}
  change_when_busy: {description: Change the version even while programs use the GPUs., type: bool, default: false}
  names: {description: Packages that must have one version., type: list, elements: str, required: true}
  wanted: {description: "Branch or version, such as 580 or 580.173.02.", type: str, required: true}
  pinning: {description: "Beginning of the name of NVIDIA's pinning package, or empty.", type: str, default: ""}
  repository: {description: Name of the source in messages., type: str, default: apt}
  lock_timeout_seconds: {description: "Time to wait for another package manager, in seconds.", type: int, default: 300}
  proxy: {description: Proxy for apt., type: str}
  no_proxy: {description: "Comma-separated hosts that are reached without the proxy.", type: str, default: ""}
"""

from ..module_utils.mixtral_run_host.apt.apt import Apt
from ..module_utils.mixtral_run_host.commands import last_lines, run
from ..module_utils.mixtral_run_host.engine import engine_use
from ..module_utils.mixtral_run_host.files import Record, explain
from ..module_utils.mixtral_run_host.gpu import driver_load, driver_parts, driver_plan, gpu_driver
from ..module_utils.mixtral_run_host.gpu.driver_states import is_version
from ..module_utils.mixtral_run_host.start import run_module

OPTIONS = {
    "host": {"type": "str", "default": ""},
    "reload": {"type": "bool", "default": True},
    "reboot": {"type": "str", "choices": ["never", "when_idle", "ask"], "default": "ask"},
    "change_when_busy": {"type": "bool", "default": False},
    "names": {"type": "list", "elements": "str", "required": True},
    "wanted": {"type": "str", "required": True},
    "pinning": {"type": "str", "default": ""},
    "repository": {"type": "str", "default": "apt"},
    "lock_timeout_seconds": {"type": "int", "default": 300},
    "proxy": {"type": "str"},
    "no_proxy": {"type": "str", "default": ""},
}


def main():
    run_module(act, OPTIONS)


def act(module):
    params = module.params
    installed = {name: version for name, (version, _) in driver_parts.packages().items()}
    have = {driver_plan.upstream(installed[name]) if name in installed else None for name in params["names"]}
    version = have.pop() if len(have) == 1 else None
    stays = is_version(version, params["wanted"])
    if not stays:
        version = _offered(module)
    deferred = _deferred(module, version)
    pinning = params["pinning"] + version if params["pinning"] and "*" not in version else ""
    mine = Record("packages").values.get("nvidia_driver", [])
    others = [
        name for name in installed if params["pinning"] and name.startswith(params["pinning"]) and name != pinning
    ]
    foreign = [name for name in others if name not in mine]
    if pinning and foreign and not deferred:
        _refuse_pinning(module, foreign, version)
    # The branch is a part of some names: packages of the former branch go in the transaction that brings the new ones.
    former = [name for name in mine if name in installed and name not in params["names"] and _is_of_driver(name)]
    module.exit_json(
        changed=False,
        version=version,
        refreshed=not stays,
        deferred=deferred,
        pattern=version if "*" in version else version + "-*",
        pinning=[pinning] if pinning else [],
        other_pinning=others if pinning else [],
        former=[name for name in former if name not in others],
    )


def _deferred(module, version):
    """Return True if the version must not be changed now. Fail the module if the operator wants to be asked."""
    params, loaded = module.params, gpu_driver.kernel_driver()
    if not loaded or loaded == version or "*" in version or params["change_when_busy"]:
        return False
    # The services of the driver hold its modules too, and they are stopped for the change.
    held = driver_load.in_use(without=driver_load.HELD_BY_SERVICES)
    busy = engine_use.why_busy() or driver_parts.why_held() or held
    if not busy and (params["reload"] or params["reboot"] == "when_idle"):
        return False
    why = busy or "the loaded module may not be replaced (nvidia_driver_reload is false)"
    if params["reboot"] == "ask" and not module.check_mode:
        module.fail_json(
            msg=explain(
                "Driver {} cannot replace {} now; nothing was changed.".format(version, loaded),
                where=params["host"],
                expected="no container, and no program on the GPUs",
                found=why,
                next_step="end it and run again, or `mixtral-run bootstrap {} --tags nvidia_driver -e nvidia_driver_reboot="
                "when_idle`, which changes the driver when the host is idle, and reboots it if need be".format(
                    params["host"]
                ),
            )
        )
    when = "when the host is idle" if busy else "with nvidia_driver_reload: true or nvidia_driver_reboot: when_idle"
    words = "{}: driver {} waits to replace {}: {}. A later run does it {}"
    module.warn(words.format(params["host"], version, loaded, why, when))
    return True


def _refuse_pinning(module, foreign, version):
    module.fail_json(
        msg=explain(
            "Somebody else locked the NVIDIA driver to another version; nothing was changed.",
            where=module.params["host"],
            expected="no pinning package, or {}{}".format(module.params["pinning"], version),
            found=", ".join(foreign),
            next_step="set nvidia_driver_version to the version of that package, or remove it: `sudo apt-get remove "
            "{}`".format(" ".join(foreign)),
        )
    )


def _is_of_driver(name):
    return name.startswith(("nvidia-", "cuda-drivers")) and not name.startswith("nvidia-driver-pinning-")


def _offered(module):
    """Return the newest version that all packages have, from lists that are read anew."""
    params = module.params
    apt = Apt(params, "/etc/apt/sources.list.d/nvidia-driver.sources", module.warn)
    answer = None if module.check_mode else apt.run(["-o", "Acquire::Retries=2", "update"])
    madison = run(["apt-cache", "madison"] + params["names"]).out
    version = driver_plan.common_version(madison, params["names"], params["wanted"])
    if version is None and module.check_mode:
        return params["wanted"] + ".*"
    if version is None:
        found = madison.strip() or last_lines(answer, 4) or "none of these packages"
        module.fail_json(
            msg=explain(
                "No version of the NVIDIA driver has all of its packages; nothing was changed.",
                where=params["repository"],
                expected="one version {} of {}".format(params["wanted"], ", ".join(params["names"])),
                found=found,
                next_step="set nvidia_driver_version to one that is there, or nvidia_driver_branch or _source to another",
            )
        )
    return version


if __name__ == "__main__":
    main()

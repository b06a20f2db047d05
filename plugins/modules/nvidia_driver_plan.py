#!/usr/bin/python
"""Decide what a host needs as its NVIDIA driver: nothing, the driver that runs already, or packages."""

from __future__ import annotations

DOCUMENTATION = """
module: nvidia_driver_plan
short_description: Decide what a host needs as its NVIDIA driver
description:
  - Reads the GPUs and switches on PCI, Secure Boot, the kernel's packages and the driver that is there. Changes nothing.
  - Returns C(action), which is C(none) on a host without GPUs, C(adopt) where a driver of the wanted branch runs, or
    C(install), with the names of the packages, the repository and its key.
options:
  host: {description: Name of the host in messages., type: str, required: true}
  gpus_wanted: {description: False if the host is to be used without its GPUs., type: bool, default: true}
  branch: {description: "Wanted branch, such as 580. If empty, any driver that runs is adopted.", type: str, default: ""}
  version: {description: "Wanted version, such as 580.173.02.", type: str, default: ""}
  source: {description: Where the packages come from., type: str, choices: [auto, nvidia, ubuntu], default: auto}
  modules: {description: Kind of the kernel modules., type: str, choices: [auto, open, proprietary], default: auto}
  board: {description: Kind of the board., type: str, choices: [auto, pcie, nvswitch, nvlink5], default: auto}
  packages: {description: Packages that replace those of the driver., type: list, elements: str, default: []}
  own_keys: {description: True if the firmware trusts the key that signs the modules of DKMS., type: bool, default: false}
  keys: {description: "File and fingerprint of the repository's key, by NVIDIA's name of the system.", type: dict, default: {}}
  repository: {description: URI of NVIDIA's repository., type: str, default: ""}
  key_url: {description: URL of its key. If empty it is the file of C(keys) in the repository., type: str, default: ""}
  key_fingerprint: {description: Fingerprint of its key. If empty it is that of C(keys)., type: str, default: ""}
"""

import os

from ..module_utils.mixtral_run_host import probe
from ..module_utils.mixtral_run_host.apt.apt import source_texts
from ..module_utils.mixtral_run_host.files import Record, explain
from ..module_utils.mixtral_run_host.gpu import driver_parts, driver_plan, gpu_driver
from ..module_utils.mixtral_run_host.start import run_module

OPTIONS = {
    "host": {"type": "str", "required": True},
    "gpus_wanted": {"type": "bool", "default": True},
    "branch": {"type": "str", "default": ""},
    "version": {"type": "str", "default": ""},
    "source": {"type": "str", "choices": ["auto", "nvidia", "ubuntu"], "default": "auto"},
    "modules": {"type": "str", "choices": ["auto", "open", "proprietary"], "default": "auto"},
    "board": {"type": "str", "choices": ["auto", "pcie", "nvswitch", "nvlink5"], "default": "auto"},
    "packages": {"type": "list", "elements": "str", "default": []},
    "own_keys": {"type": "bool", "default": False},
    "keys": {"type": "dict", "default": {}, "no_log": False},
    "repository": {"type": "str", "default": ""},
    "key_url": {"type": "str", "default": "", "no_log": False},
    "key_fingerprint": {"type": "str", "default": "", "no_log": False},
}


def main():
    run_module(act, OPTIONS)


def act(module):
    params = module.params
    host = read_host(params["board"], module.warn)
    try:
        plan = driver_plan.plan(host, params)
        key = _key(params, host) if plan.source == "nvidia" else {}
    except driver_plan.Refused as refused:
        module.fail_json(
            msg=explain(
                "The NVIDIA driver cannot be installed as wanted; nothing was changed.",
                where=params["host"],
                expected=refused.expected,
                found=refused.found,
                next_step=refused.step,
            )
        )
    if plan.action == "install" and (host.os_id, plan.source) == ("debian", "nvidia") and not _has_contrib():
        module.warn("NVIDIA's packages for Debian need packages of its component contrib, which no source of apt has")
    wanted = params["version"] or params["branch"] or (host.library if host.managed else None)
    wanted = wanted or driver_plan.DEFAULT_BRANCH
    module.exit_json(
        changed=False, **plan._asdict(), board=host.board, wanted=wanted, secure_boot=host.secure_boot, **key
    )


def read_host(board, warn):
    """Return what the plan is made of. board: "auto" or the kind of the board. warn: what reports a board that is kept."""
    gpus, release = probe.gpus(), probe.os_release()
    pci_ids = driver_parts.pci_gpus()
    packages = {name: version for name, (version, _) in driver_parts.packages().items()}
    managed = bool(Record("packages").values.get("nvidia_driver"))
    if board == "auto":
        switches = {"pci": "nvswitch", "nvlink5": "nvlink5"}.get(gpu_driver.nvswitch())
        found = switches or ("pcie" if pci_ids or gpus["gpus"] else "")
        board = driver_plan.kept_board(found, packages, managed)
        if board != found:
            warn(
                "PCI shows no NVSwitches, and the kit installed a fabric manager: it stays (board {}). If this host has no "
                "switches, set nvidia_driver_board: pcie".format(board)
            )
    return driver_plan.Host(
        os_id=release["id"],
        os_version=release["version"],
        kernel=os.uname().release,
        packages=packages,
        pci_ids=pci_ids,
        board=board,
        secure_boot=driver_parts.secure_boot(),
        loaded=gpu_driver.kernel_driver() or gpus["driver"],
        library=driver_parts.library_version(),
        error=gpus["error"],
        managed=managed,
    )


def _key(params, host):
    """Return where the repository's key is, and its fingerprint. Raise driver_plan.Refused for an unknown system."""
    name = driver_plan.distribution(host.os_id, host.os_version)
    known = params["keys"].get(name, {})
    url = params["key_url"] or "{}/{}".format(params["repository"].rstrip("/"), known.get("file", ""))
    fingerprint = params["key_fingerprint"] or known.get("fingerprint", "")
    if not fingerprint or not (params["key_url"] or known):
        raise driver_plan.Refused(
            "one of {}".format(", ".join(sorted(params["keys"]))),
            "{}, for which no key of NVIDIA's repository is known".format(name),
            "set nvidia_driver_repository_key_url and nvidia_driver_repository_key_fingerprint",
        )
    return {"key_url": url, "key_fingerprint": fingerprint}


def _has_contrib():
    return any("contrib" in text for text in source_texts().values())


if __name__ == "__main__":
    main()

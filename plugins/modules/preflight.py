#!/usr/bin/python
"""Compare a host with the requirements and report every shortfall at once."""

from __future__ import annotations

DOCUMENTATION = """
module: preflight
short_description: Compare a host with the requirements and report every shortfall at once
description:
  - Fails once with all shortfalls of level C(fail), and warns of those of level C(warn). Changes nothing.
options:
  host:
    description: Name of the host in messages.
    type: str
    required: true
  limits:
    description: Thresholds, named as in the role's defaults.
    type: dict
    required: true
  levels:
    description: Level of each check, C(fail), C(warn) or C(skip).
    type: dict
    default: {}
  disks:
    description: Folders that need C(limits.free_gib).
    type: list
    elements: path
    default: []
  folders:
    description: Folders that need other space. The keys are data_root, containerd_root, hf_cache, swap and tmp.
    type: dict
    required: true
  space:
    description: Space for image, hf_cache and tmp, in GiB.
    type: dict
    default: {}
  image:
    description: Name of the image. A host that has it needs no space for it.
    type: str
    required: true
  docker_version:
    description: Version of docker-ce that will be installed, if it is pinned.
    type: str
    default: ""
  login_output:
    description: What the start-up files of the login user print for a command.
    type: str
    default: ""
  own_folders:
    description: Folders of the kit. Their contents count as free space, because the space is meant for them.
    type: list
    elements: path
    default: []
  engine:
    description: "Settings of the engine to come: the options of M(engine_conflicts) but section and path."
    type: dict
    default: {}
  mirrors:
    description: URLs that must answer. C({id}), C({codename}) and C({arch}) are filled in from the host.
    type: list
    elements: str
    default: []
  proxy:
    description: Proxy for the mirrors.
    type: str
  no_proxy:
    description: Comma-separated hosts that are reached without the proxy.
    type: str
    default: ""
  timeout_seconds:
    description: Time limit for the answer of a mirror, in seconds.
    type: int
    default: 10
"""

import os
import socket
import time
from email.utils import parsedate_to_datetime
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener, proxy_bypass_environment

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.mixtral_run_host import probe, shortfalls, space
from ..module_utils.mixtral_run_host.apt import apt_sources
from ..module_utils.mixtral_run_host.engine import engine_unit
from ..module_utils.mixtral_run_host.files import Record


def main():
    module = AnsibleModule(
        argument_spec={
            "host": {"type": "str", "required": True},
            "limits": {"type": "dict", "required": True},
            "levels": {"type": "dict", "default": {}},
            "disks": {"type": "list", "elements": "path", "default": []},
            "folders": {"type": "dict", "required": True},
            "space": {"type": "dict", "default": {}},
            "image": {"type": "str", "required": True},
            "docker_version": {"type": "str", "default": ""},
            "login_output": {"type": "str", "default": ""},
            "own_folders": {"type": "list", "elements": "path", "default": []},
            "engine": {"type": "dict", "default": {}},
            "mirrors": {"type": "list", "elements": "str", "default": []},
            "proxy": {"type": "str"},
            "no_proxy": {"type": "str", "default": ""},
            "timeout_seconds": {"type": "int", "default": 10},
        },
        supports_check_mode=True,
    )
    params = module.params
    params["limits"] = shortfalls.with_numbers(params["limits"])
    wrong = [
        "{}: {}".format(name, level)
        for name, level in params["levels"].items()
        if name not in shortfalls.CHECKS or level not in ("fail", "warn", "skip")
    ]
    if wrong:
        module.fail_json(
            msg="preflight_checks holds what is not known: {}\n  expected: {} as fail, warn or skip".format(
                ", ".join(wrong), ", ".join(shortfalls.CHECKS)
            )
        )
    release, arch = probe.os_release(), probe.architecture()
    params["mirrors"] = [apt_sources.expand(url, release, arch).replace("$(ARCH)", arch) for url in params["mirrors"]]
    state = probe.machine(params["disks"])
    state["space"] = _space(params, state["memory"]["ram_gib"])
    state["printed_at_login"] = params["login_output"].strip()
    state["engine_conflicts"] = _engine_conflicts(params["engine"])
    state.update(_network(params))
    found = shortfalls.collect(state, params["limits"], params["levels"])
    failures = [item for item in found if item.level == "fail"]
    for item in found:
        if item.level == "warn":
            words = "{}: {}: expected {}; found {}; next: {}"
            module.warn(words.format(params["host"], item.check, item.expected, item.found, item.remedy))
    listed = [item._asdict() for item in found]
    facts = {"mixtral_run": state}
    if failures:
        module.fail_json(msg=shortfalls.render(params["host"], failures), shortfalls=listed, ansible_facts=facts)
    # The docker role need not compare the same settings again.
    conflicts = state["engine_conflicts"]
    told = not any(each[0] == "fail" for each in conflicts) and params["levels"].get("engine") != "skip"
    agreed = params["engine"] if told or not conflicts else {}
    announced = engine_unit.announcements(conflicts)
    module.exit_json(
        changed=False, shortfalls=listed, engine_agrees_with=agreed, announcements=announced, ansible_facts=facts
    )


def _space(params, ram_gib):
    """Return the needs and the free space of each filesystem that the kit will write to."""
    folders, limits = params["folders"], params["limits"]
    swap_gib = space.swap_growth(folders["swap"], shortfalls.planned_swap(ram_gib, limits))
    wanted = {name: float(gib) for name, gib in params["space"].items()}
    image = space.image_place(params["image"], params["docker_version"])
    checkpoints = params["disks"], float(limits["free_gib"])
    return space.by_filesystem(space.needs(folders, wanted, checkpoints, swap_gib, image), params["own_folders"])


def _engine_conflicts(settings):
    owned = Record("daemon_json").values.get("sections", {}).get("docker", [])
    return engine_unit.conflicts(settings, owned)[0]


def _network(params):
    mirrors, dns, offsets = {}, {}, []
    os.environ["no_proxy"] = params["no_proxy"]  # urllib reads it even if the caller passes a proxy
    for url in params["mirrors"] if params["levels"].get("mirrors") != "skip" else []:
        mirrors[url], offset = _ask(url, params["proxy"], params["timeout_seconds"])
        offsets += [] if offset is None else [offset]
    for name in [urlsplit(url).hostname for url in params["mirrors"]]:
        if not params["proxy"] or proxy_bypass_environment(name):
            dns[name] = _resolve(name)
    # The smallest offset is the best estimate: a slow answer adds its delay to the offset.
    offset = min(offsets, key=abs) if offsets else None
    return {"mirrors": mirrors, "dns": dns, "clock_offset_seconds": offset}


def _resolve(name):
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        return str(error)
    return None


def _ask(url, proxy, timeout):
    """Return why the mirror does not answer, or None; and this clock minus the mirror's in seconds, or None."""
    opener = build_opener(ProxyHandler({"http": proxy, "https": proxy} if proxy else {}))
    try:
        with opener.open(Request(url, method="HEAD", headers={"User-Agent": "mixtral-run"}), timeout=timeout) as answer:
            reported = answer.headers.get("Date")
    except HTTPError as error:
        # The mirror answers: a folder that may not be listed (403, 404) can still serve its files.
        if error.code >= 500:
            return "HTTP {}".format(error.code), None
        reported = error.headers.get("Date")
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error)), None
    try:
        return None, time.time() - parsedate_to_datetime(reported).timestamp()
    except (TypeError, ValueError):
        return None, None


if __name__ == "__main__":
    main()

#!/usr/bin/python
"""Install packages at given versions, hold them, and record which of them the kit installed."""

from __future__ import annotations

DOCUMENTATION = """
module: apt_packages
short_description: Install packages at given versions, hold them, and record which the kit installed
description:
  - One transaction installs all packages and removes conflicting ones. No network request is made if no package is
    missing. Works without python3-apt, and in check mode on a host that does not know the repository yet.
options:
  section: {description: Name under which the packages are recorded., type: str, required: true}
  names: {description: Packages to install., type: list, elements: str, required: true}
  version: {description: "Version of all packages, with C(*) as in apt. If empty, the first installation takes the newest.", type: str, default: ""}
  versions: {description: Versions by package. They override C(version)., type: dict, default: {}}
  conflicting: {description: Packages to remove in the same transaction., type: list, elements: str, default: []}
  hold: {description: Hold the packages so that unattended upgrades leave them alone., type: bool, default: true}
  repository: {description: "URI of the repository. The module fails with a message that names it if it does not answer.", type: str, default: ""}
  restart_when_busy:
    description:
      - C(false) states that running containers depend on these packages. The scripts of the engine's packages stop and
        start it; the scripts of the NVIDIA toolkit can take the GPUs away from containers. A change of installed packages
        is then deferred while containers or GPU processes run (C(deferred) is true), and a removal is refused.
    type: bool
    default: true
  lock_timeout_seconds: {description: "Time to wait for another package manager, in seconds.", type: int, default: 300}
  proxy: {description: Proxy for apt., type: str}
  no_proxy: {description: "Comma-separated hosts that are reached without the proxy.", type: str, default: ""}
  state: {description: "C(absent) removes the packages that C(present) installed, and restores the holds of the others.", type: str, choices: [present, absent], default: present}
"""

import fnmatch
import re
import tempfile
import time

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.mixtral_run_host import engine_use
from ..module_utils.mixtral_run_host.commands import last_lines, run
from ..module_utils.mixtral_run_host.files import Record, explain

OPTIONS = {
    "section": {"type": "str", "required": True},
    "names": {"type": "list", "elements": "str", "required": True},
    "version": {"type": "str", "default": ""},
    "versions": {"type": "dict", "default": {}},
    "conflicting": {"type": "list", "elements": "str", "default": []},
    "hold": {"type": "bool", "default": True},
    "repository": {"type": "str", "default": ""},
    "restart_when_busy": {"type": "bool", "default": True},
    "lock_timeout_seconds": {"type": "int", "default": 300},
    "proxy": {"type": "str"},
    "no_proxy": {"type": "str", "default": ""},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
}

APT_SECONDS = 1800
RETRY_SECONDS = 2


def main():
    act(AnsibleModule(argument_spec=OPTIONS, supports_check_mode=True))


def act(module):
    record = Record("packages", check_mode=module.check_mode)
    if module.params["state"] == "present":
        _present(module, record)
    else:
        _absent(module, record)


def _packages():
    """Return the installed packages with their versions, and the set of held packages.

    A package whose installation by dpkg was interrupted has the version None.
    """
    fields = "${Package} ${Version} ${db:Status-Status} ${db:Status-Want}\\n"
    found, held = {}, set()
    for line in run(["dpkg-query", "--show", "--showformat", fields]).out.splitlines():
        name, version, status, want = (line.split(" ") + ["", "", ""])[:4]
        if status == "installed":
            found[name] = version
        elif status not in ("config-files", "not-installed"):
            found[name] = None
        if want == "hold":
            held.add(name)
    return found, held


def _wanted_version(params, name):
    return params["versions"].get(name) or params["version"]


def _present(module, record):
    params = module.params
    installed, held = _packages()
    wrong = [
        name
        for name in params["names"]
        if not installed.get(name)
        or (_wanted_version(params, name) and not fnmatch.fnmatchcase(installed[name], _wanted_version(params, name)))
    ]
    removed = [name for name in params["conflicting"] if name in installed and name not in params["names"]]
    unheld = [name for name in params["names"] if (name not in held) == params["hold"]]
    mine = record.values.setdefault(params["section"], [])
    holds = record.values.setdefault(_holds(params), {})
    fresh = [name for name in params["names"] if name not in installed and name not in mine]
    _defer_when_busy(module, [name for name in wrong + removed if name in installed], installed)
    changed = bool(wrong or removed or unheld)
    before = "".join("{} {}\n".format(name, installed[name]) for name in params["names"] + removed if name in installed)
    if changed and not module.check_mode:
        mine += fresh
        for name in unheld:
            if name not in mine:
                holds.setdefault(name, name in held)
        record.save()  # before the change, so that `absent` knows what to remove even if this run is killed
        if wrong or removed:
            _install(module, wrong, removed)
            # An upgrade of a held package removes the hold.
            unheld = params["names"]
        if unheld:
            _checked(module, ["apt-mark", "hold" if params["hold"] else "unhold"] + unheld, "The hold cannot be set.")
    now = _packages()[0] if changed and not module.check_mode else installed
    after = "".join("{} {}\n".format(name, now.get(name) or "(to be installed)") for name in params["names"])
    module.exit_json(
        changed=changed,
        installed=wrong,
        removed=removed,
        versions={name: now.get(name) for name in params["names"]},
        diff={"before": before, "after": after, "before_header": "packages", "after_header": "packages"},
    )


def _holds(params):
    """Return the key of the record that lists which packages not installed by the kit were held before the kit came."""
    return params["section"] + "_holds"


def _defer_when_busy(module, touched, installed):
    """End the module without a change if containers depend on the `touched` packages and the host is busy."""
    if not touched or module.params["restart_when_busy"]:
        return
    why = engine_use.why_busy()
    if not why:
        return
    module.warn(
        "Packages that containers stand on wait to be changed ({}): {}. It is done by a later run when the host is idle, or "
        "now with {}_restart_when_busy: true".format(", ".join(touched), why, module.params["section"])
    )
    versions = {name: installed.get(name) for name in module.params["names"]}
    module.exit_json(changed=False, deferred=True, reason=why, installed=[], removed=[], versions=versions)


def _absent(module, record):
    params = module.params
    installed, _ = _packages()
    mine = [name for name in record.values.get(params["section"], []) if name in installed]
    changed = params["section"] in record.values
    why = engine_use.why_busy() if mine and not params["restart_when_busy"] else ""
    if why:
        module.fail_json(
            msg=explain(
                "Packages that containers stand on are not removed: that would stop what runs.",
                where=", ".join(mine),
                expected="no containers, and no processes on GPUs",
                found=why,
                next_step="end it and run again, or set {}_restart_when_busy: true".format(params["section"]),
            )
        )
    if not module.check_mode and changed:
        holds = record.values.pop(_holds(params), {})
        for verb, wanted in (("hold", True), ("unhold", False)):
            names = [name for name in holds if name in installed and holds[name] == wanted]
            if names:
                _checked(module, ["apt-mark", verb] + names, "The hold cannot be taken back.")
        if mine:
            run(["apt-mark", "unhold"] + mine)
            answer = _apt(params, ["remove"] + mine)
            if answer.code:
                _fail(module, "The packages cannot be removed.", answer, [])
        del record.values[params["section"]]
        record.save()
    module.exit_json(changed=changed, removed=mine)


def _apt(params, words):
    """Run apt-get and wait for its locks. Its own option waits for dpkg's lock, not for those of lists and archives."""
    argv = ["apt-get", "--yes", "-o", "DPkg::Lock::Timeout={}".format(params["lock_timeout_seconds"])]
    argv += ["-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold"]
    direct, environment = [name.strip().lstrip(".") for name in params["no_proxy"].split(",") if name.strip()], {}
    with tempfile.NamedTemporaryFile("w", prefix="mixtral-run-", suffix=".conf", encoding="utf-8") as settings:
        if params["proxy"] and "*" not in direct:
            # Every user sees the arguments of a program, and a proxy's address may contain a password. The file is
            # readable by root only. Like an argument, it overrides /etc/apt; the environment would not.
            address = re.sub(r'[\x00-\x20\x7f"\\]', lambda found: "%{:02X}".format(ord(found.group())), params["proxy"])
            settings.writelines('Acquire::{}::Proxy "{}";\n'.format(each, address) for each in ("http", "https"))
            settings.flush()
            argv += ["--config-file=" + settings.name]
            # apt also reads this variable. It compares each entry, including blanks, with the end of the host name.
            environment["no_proxy"] = ",".join(direct)
        until = time.monotonic() + params["lock_timeout_seconds"]
        while True:
            answer = run(argv + words, timeout=APT_SECONDS, environment=environment)
            locked = answer.code and "Could not get lock" in answer.out + answer.err
            if not locked or time.monotonic() >= until:
                return answer
            time.sleep(RETRY_SECONDS)


def _install(module, names, removed):
    params = module.params
    if run(["dpkg", "--audit"]).out.strip():
        # An earlier run of the kit or of apt was killed before it finished.
        _checked(
            module, ["dpkg", "--force-confold", "--configure", "-a"], "dpkg cannot finish what was begun.", APT_SECONDS
        )
    _refresh(module)
    words = [name + ("=" + _wanted_version(params, name) if _wanted_version(params, name) else "") for name in names]
    words += [name + "-" for name in removed]
    options = ["--no-install-recommends", "--allow-downgrades", "--allow-change-held-packages"]
    answer = _apt(params, ["install"] + options + words)
    if answer.code:
        _fail(module, "The packages cannot be installed.", answer, names)


def _refresh(module):
    # `apt-get update` exits with 0 even if a mirror does not answer, so its output is checked.
    params = module.params
    answer = _apt(params, ["-o", "Acquire::Retries=2", "update"])
    bad = [line for line in (answer.out + answer.err).splitlines() if line.startswith(("Err:", "E:", "W:"))]
    if params["repository"] and any(params["repository"].replace("$(ARCH)", "") in line for line in bad):
        _fail(module, "The package repository does not answer.", answer, [])
    if answer.code:
        _fail(module, "The package lists cannot be read.", answer, [])
    for line in bad:
        module.warn(line)


def _fail(module, what, answer, names):
    text = answer.out + answer.err
    offered = run(["apt-cache", "madison"] + names).out.strip() if names else ""
    steps = {
        "Could not get lock": "another package manager runs: wait, or raise ..._lock_timeout_seconds",
        "was not found": "pin a version that the repository offers:\n{}".format(offered),
        "NO_PUBKEY": "the repository is signed with another key than the pinned one",
        "Conflicting values": "two source files name the repository with different keys: remove one",
    }
    found = next((step for words, step in steps.items() if words in text), "run it by hand on the host to see more")
    module.fail_json(
        msg=explain(
            what,
            where=module.params["repository"] or "apt",
            expected=" ".join(names),
            found=last_lines(answer, 6),
            next_step=found,
        )
    )


def _checked(module, argv, what, timeout=60):
    answer = run(argv, timeout=timeout)
    if answer.code:
        _fail(module, what, answer, [])


if __name__ == "__main__":
    main()

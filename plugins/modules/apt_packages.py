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
  leave_holds: {description: Packages of C(names) whose hold stays as it is., type: list, elements: str, default: []}
  refresh: {description: Read the lists of packages anew before a change., type: bool, default: true}
  hold_also: {description: Regular expression for names of dependencies that are held too., type: str, default: ""}
  repository:
    description:
      - URI of the repository, with C({id}) and C({arch}) filled in from the host. The module fails with a message that names
        it if it does not answer. A repository of somebody else that does not answer is a warning that names its file.
    type: str
    default: ""
  remove_dependents:
    description:
      - Let packages go that depend on the removed ones, and change packages that somebody holds. Without it the module
        fails before it changes anything, and lists them.
    type: bool
    default: false
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
  leftovers:
    description: Files and empty folders that C(absent) removes with the packages, unless they were there before them.
    type: list
    elements: path
    default: []
  groups:
    description: Groups of the system that C(absent) removes with the packages, unless they were there before or have members.
    type: list
    elements: str
    default: []
  state: {description: "C(absent) removes the packages that C(present) installed with their settings and the dependencies that nothing else needs, and restores the holds of the others.", type: str, choices: [present, absent], default: present}
"""

import fnmatch
import re

from ..module_utils.mixtral_run_host import probe
from ..module_utils.mixtral_run_host.apt import apt_output, apt_sources
from ..module_utils.mixtral_run_host.apt.apt import SOURCES, Apt, source_texts
from ..module_utils.mixtral_run_host.apt.apt_footprint import Footprint
from ..module_utils.mixtral_run_host.commands import last_lines, run
from ..module_utils.mixtral_run_host.engine import engine_use
from ..module_utils.mixtral_run_host.files import Record, explain
from ..module_utils.mixtral_run_host.start import run_module

OPTIONS = {
    "section": {"type": "str", "required": True},
    "names": {"type": "list", "elements": "str", "required": True},
    "version": {"type": "str", "default": ""},
    "versions": {"type": "dict", "default": {}},
    "conflicting": {"type": "list", "elements": "str", "default": []},
    "hold": {"type": "bool", "default": True},
    "leave_holds": {"type": "list", "elements": "str", "default": []},
    "refresh": {"type": "bool", "default": True},
    "hold_also": {"type": "str", "default": ""},
    "repository": {"type": "str", "default": ""},
    "remove_dependents": {"type": "bool", "default": False},
    "restart_when_busy": {"type": "bool", "default": True},
    "lock_timeout_seconds": {"type": "int", "default": 300},
    "proxy": {"type": "str"},
    "no_proxy": {"type": "str", "default": ""},
    "leftovers": {"type": "list", "elements": "path", "default": []},
    "groups": {"type": "list", "elements": "str", "default": []},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
}

DPKG_SECONDS = 1800
# The kit's own holds are no reason to refuse; a simulation comes before they are taken off.
REMOVE = ["remove", "--allow-change-held-packages"]


def main():
    run_module(act, OPTIONS)


def act(module):
    record = Record("packages", check_mode=module.check_mode)
    architecture = probe.architecture()
    repository = apt_sources.expand(module.params["repository"], probe.os_release(), architecture)
    module.params["repository"] = repository.replace("$(ARCH)", architecture)
    own_source = "{}/sources.list.d/{}.sources".format(SOURCES, module.params["section"].replace("_", "-"))
    apt = Apt(module.params, own_source, module.warn)
    if module.params["state"] == "present":
        _present(module, record, apt)
    else:
        _absent(module, record, apt)


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


def _present(module, record, apt):
    params = module.params
    installed, held = _packages()
    wrong = [
        name
        for name in params["names"]
        if not installed.get(name)
        or (_wanted_version(params, name) and not fnmatch.fnmatchcase(installed[name], _wanted_version(params, name)))
    ]
    removed = [name for name in params["conflicting"] if name in installed and name not in params["names"]]
    unheld = _wrongly_held(params, installed, held)
    mine = record.values.setdefault(params["section"], [])
    holds, also = record.values.setdefault(_key(params, "holds"), {}), record.values.get(_key(params, "also_held"), [])
    fresh = [name for name in params["names"] if name not in installed and name not in mine]
    _defer_when_busy(module, [name for name in wrong + removed if name in installed], installed)
    changed = bool(wrong or removed or unheld)
    dragged, new = [], []
    if wrong or removed:
        if not module.check_mode:
            _finish_dpkg(module, apt)
            if params["refresh"]:
                _refresh(module, apt)
        dragged, new = _dragged(module, apt, wrong, removed, installed, held - set(mine), set(also))
    listed = [name for name in params["names"] + removed + dragged if name in installed]
    before = "".join("{} {}\n".format(name, installed[name]) for name in listed)
    if changed and not module.check_mode:
        mine += fresh
        _footprint(module, record).note(fresh, new)
        for name in unheld:
            if name not in mine and name in params["names"]:
                holds.setdefault(name, name in held)
        record.save()  # before the change, so that `absent` knows what to remove even if this run is killed
        if wrong or removed:
            _install(module, apt, wrong, removed)
            # An upgrade of a held package removes the hold.
            unheld = _wrongly_held(params, *_packages())
        more = sorted(set(unheld) - set(params["names"]))
        if more:
            record.values[_key(params, "also_held")] = sorted(set(also) | set(more))
            record.save()
        if unheld:
            answer = apt.mark("hold" if params["hold"] else "unhold", unheld)
            if answer.code:
                _fail(module, "The hold cannot be set.", answer, where="apt-mark")
    now = _packages()[0] if changed and not module.check_mode else installed
    after = "".join("{} {}\n".format(name, now.get(name) or "(to be installed)") for name in params["names"])
    module.exit_json(
        changed=changed,
        installed=wrong,
        removed=removed + dragged,
        versions={name: now.get(name) for name in params["names"]},
        diff={"before": before, "after": after, "before_header": "packages", "after_header": "packages"},
    )


def _wrongly_held(params, installed, held):
    """Return the packages whose hold has to change: those of `names`, and the dependencies of `hold_also`."""
    names = [name for name in params["names"] if name not in params["leave_holds"]]
    if params["hold_also"] and params["hold"]:
        names += [name for name in sorted(set(installed) - set(params["names"])) if re.match(params["hold_also"], name)]
    return [name for name in names if (name not in held) == params["hold"]]


def _dragged(module, apt, wrong, removed, installed, held, also):
    """Return the packages of somebody else that the transaction would remove, or change although they are held.

    Return the packages that it would add too. Fail the module if there are any, unless `remove_dependents` allows it.
    also: dependencies that the kit holds, which may go.
    """
    plan, answer = apt.simulate(["install"] + _words(module.params, wrong, removed))
    if answer.code and not module.check_mode:
        _fail(module, "The packages cannot be installed; nothing was changed.", answer, wrong)
    if answer.code and removed:
        # A check before the first run: apt does not know the repository yet. What depends on the packages, it knows.
        plan, _ = apt.simulate(REMOVE + removed)
    mine = set(module.params["names"]) | also
    dragged = [name for name in plan.removed if name not in mine and (name not in removed or name in held)]
    dragged += [name for name in plan.changed if name in held and name not in mine]
    _refuse_dragged(module, dragged, held, removed or wrong, installed)
    return [name for name in dragged if name not in removed], plan.new


def _refuse_dragged(module, dragged, held, because, installed):
    if not dragged or module.params["remove_dependents"]:
        return
    told = [
        "{} {}{}".format(name, installed.get(name) or "", " (held by somebody)" if name in held else "").strip()
        for name in dragged
    ]
    variable = "{}_remove_dependents".format(module.params["section"])
    module.fail_json(
        msg=explain(
            "Packages that somebody else installed would be removed or changed as well; nothing was changed.",
            where="apt: " + ", ".join(because),
            expected="no other package depends on the ones that go",
            found=", ".join(told),
            next_step="decide whether they may go: {}: true removes them; otherwise leave this role out".format(
                variable
            ),
        ),
        dragged=dragged,
    )


def _footprint(module, record):
    params = module.params
    return Footprint(record, params["section"], params["leftovers"], params["groups"])


def _key(params, kind):
    """Return a key of the record. holds: packages that were there before the kit, True for held. also_held: dependencies."""
    return "{}_{}".format(params["section"], kind)


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


def _absent(module, record, apt):
    params = module.params
    installed, held = _packages()
    held -= set(record.values.get(_key(params, "also_held"), []))
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
    dragged = []
    if mine:
        plan, answer = apt.simulate(REMOVE + mine)
        if answer.code:
            _fail(module, "The packages cannot be removed; nothing was changed.", answer, where="apt")
        dragged = [name for name in plan.removed if name not in mine]
        _refuse_dragged(module, dragged, set(), mine, installed)
    footprint = _footprint(module, record)
    unneeded = [name for name in footprint.unneeded(apt, mine, installed) if name not in held and name not in dragged]
    if not module.check_mode and changed:
        holds = record.values.pop(_key(params, "holds"), {})
        holds.update(dict.fromkeys(record.values.pop(_key(params, "also_held"), []), False))
        for verb, wanted in (("hold", True), ("unhold", False)):
            names = [name for name in holds if name in installed and holds[name] == wanted]
            answer = apt.mark(verb, names) if names else None
            if answer and answer.code:
                _fail(module, "The hold cannot be taken back.", answer, where="apt-mark")
        if mine:
            apt.mark("unhold", mine)
            answer = apt.run(REMOVE + mine + unneeded)
            if answer.code and any(name in _packages()[0] for name in mine):
                _fail(module, "The packages cannot be removed.", answer, where="apt")
        for words in footprint.sweep(apt, record.values[params["section"]]):
            module.warn(words)
        del record.values[params["section"]]
        record.save()
    gone = mine + unneeded + dragged
    before = "".join("{} {}\n".format(name, installed[name]) for name in gone)
    header = {"before_header": "packages", "after_header": "packages"}
    module.exit_json(changed=changed, removed=gone, diff=dict(before=before, after="", **header))


def _words(params, names, removed):
    """Return the arguments of `apt-get install` for packages to install and to remove."""
    words = ["--no-install-recommends", "--allow-downgrades", "--allow-change-held-packages"]
    # Dependencies that the kit holds change with the packages; those that others hold are refused by _dragged.
    words += ["-o", "APT::Ignore-Hold=true"] if params["hold_also"] else []
    words += [name + ("=" + _wanted_version(params, name) if _wanted_version(params, name) else "") for name in names]
    return words + [name + "-" for name in removed]


def _finish_dpkg(module, apt):
    """Complete what a killed run of apt or of the kit began. A package of somebody else that fails is a warning."""

    def attempt():
        # What looks interrupted may be the work of an apt that still runs, and be complete once that has ended.
        audit = run(["dpkg", "--audit"])
        if not audit.out.strip():
            return audit._replace(code=0)
        return run(["dpkg", "--force-confold", "--configure", "-a"], timeout=DPKG_SECONDS)

    answer = apt.when_free(attempt)
    if not answer.code:
        return
    broken = apt_output.broken_packages(answer.out + answer.err)
    if not broken or set(broken) & set(module.params["names"]):
        _fail(module, "dpkg cannot finish what was begun.", answer, where="dpkg")
    module.warn(
        "dpkg was interrupted and cannot configure {}, which is not the kit's: `sudo dpkg --configure -a` on the host shows "
        "why".format(", ".join(broken))
    )


def _install(module, apt, names, removed):
    answer = apt.run(["install"] + _words(module.params, names, removed))
    if not answer.code:
        return
    now, broken = _packages()[0], apt_output.broken_packages(answer.out + answer.err)
    if broken and not set(broken) & set(module.params["names"]) and all(now.get(name) for name in names):
        module.warn(
            "The packages were installed, and dpkg cannot configure {}, which is not the kit's: `sudo dpkg --configure -a` "
            "on the host shows why".format(", ".join(broken))
        )
        return
    _fail(module, "The packages cannot be installed.", answer, names)


def _refresh(module, apt):
    # `apt-get update` exits with 0 even if a mirror does not answer, so its output is checked.
    answer = apt.run(["-o", "Acquire::Retries=2", "update"])
    text, repository = answer.out + answer.err, module.params["repository"]
    found, texts = apt_output.problems(text), source_texts()
    if any(apt_output.belongs_to(problem.uri, repository) for problem in found):
        _fail(module, "The package repository does not answer.", answer)
    if answer.code and not found:
        _fail(module, "The package lists cannot be read.", answer, where="apt")
    for problem in found:
        files = ", ".join(apt_output.files_naming(problem.uri, texts)) or "no source file names it"
        module.warn(
            "A package source that is not the kit's does not answer: {} ({}): {}. The kit's packages do not come from "
            "it".format(problem.uri, files, problem.message)
        )


def _fail(module, what, answer, names=(), where=""):
    text = answer.out + answer.err
    offered = run(["apt-cache", "madison"] + list(names)).out.strip() if names else ""
    broken = [name for name in apt_output.broken_packages(text) if name not in module.params["names"]]
    found = apt_output.next_step(text, offered)
    if broken:
        found = "{} cannot be configured: `sudo dpkg --configure -a` on the host shows why".format(", ".join(broken))
    module.fail_json(
        msg=explain(
            what,
            where=where or module.params["repository"] or "apt",
            expected=" ".join(names),
            found=last_lines(answer, 6),
            next_step=found,
        )
    )


if __name__ == "__main__":
    main()

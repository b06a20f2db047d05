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
  restore_replaced:
    description:
      - Record the packages of the host that the transaction removes, with versions, marks, services and configuration files,
        and install them again with C(absent). If they cannot come back, C(absent) fails before it removes anything.
    type: bool
    default: false
  config_files:
    description: Configuration files of the host that the packages take over. They are kept, and put back by C(absent).
    type: list
    elements: path
    default: []
  units:
    description: Services whose state returns with the packages of C(restore_replaced).
    type: list
    elements: str
    default: []
  state: {description: "C(absent) removes the packages that C(present) installed with their settings and the dependencies that nothing else needs, and restores the holds of the others.", type: str, choices: [present, absent], default: present}
"""

import contextlib
import fnmatch
import re

from ..module_utils.mixtral_run_host import probe
from ..module_utils.mixtral_run_host.apt import apt_output, apt_sources, transaction
from ..module_utils.mixtral_run_host.apt.apt import SOURCES, Apt
from ..module_utils.mixtral_run_host.apt.apt_footprint import Footprint
from ..module_utils.mixtral_run_host.apt.replaced import INSTALLED, Replaced, refuse
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
    "restore_replaced": {"type": "bool", "default": False},
    "config_files": {"type": "list", "elements": "path", "default": []},
    "units": {"type": "list", "elements": "str", "default": []},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
}


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


def _present(module, record, apt):
    params = module.params
    installed, held = transaction.packages()
    wrong = [
        name
        for name in params["names"]
        if not installed.get(name)
        or (
            transaction.wanted_version(params, name)
            and not fnmatch.fnmatchcase(installed[name], transaction.wanted_version(params, name))
        )
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
            transaction.finish_dpkg(module, apt)
            if params["refresh"]:
                transaction.refresh(module, apt)
        dragged, new = _dragged(module, apt, wrong, removed, installed, held - set(mine), set(also))
    listed = [name for name in params["names"] + removed + dragged if name in installed]
    before = "".join("{} {}\n".format(name, installed[name]) for name in listed)
    if changed and not module.check_mode:
        mine += fresh
        _footprint(module, record).note(fresh, new)
        gone = [name for name in removed + dragged if params["restore_replaced"] and name in installed]
        _replaced(module, record).note(gone, fresh, installed, held - set(mine), apt)
        for name in unheld:
            if name not in mine and name in params["names"]:
                holds.setdefault(name, name in held)
        record.save()  # before the change, so that `absent` knows what to remove even if this run is killed
        if wrong or removed:
            transaction.install(module, apt, wrong, removed)
            # An upgrade of a held package removes the hold.
            unheld = _wrongly_held(params, *transaction.packages())
        more = sorted(set(unheld) - set(params["names"]))
        if more:
            record.values[_key(params, "also_held")] = sorted(set(also) | set(more))
            record.save()
        if unheld:
            answer = apt.mark("hold" if params["hold"] else "unhold", unheld)
            if answer.code:
                transaction.fail(module, "The hold cannot be set.", answer, where="apt-mark")
    now = transaction.packages()[0] if changed and not module.check_mode else installed
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
    plan, answer = apt.simulate(["install"] + transaction.words(module.params, wrong, removed))
    if answer.code and not module.check_mode:
        transaction.fail(module, "The packages cannot be installed; nothing was changed.", answer, wrong)
    if answer.code and removed:
        # A check before the first run: apt does not know the repository yet. What depends on the packages, it knows.
        plan, _ = apt.simulate(transaction.REMOVE + removed)
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


def _replaced(module, record):
    params = module.params
    return Replaced(record, params["section"], params["config_files"], params["units"])


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
    installed, held = transaction.packages()
    held -= set(record.values.get(_key(params, "also_held"), []))
    mine = [name for name in record.values.get(params["section"], []) if name in installed]
    _refuse_when_busy(module, mine)
    if params["section"] in record.values and not module.check_mode:
        # apt-get refuses everything as long as the work of a killed run is not completed.
        transaction.finish_dpkg(module, apt)
        installed = transaction.packages()[0]
    replaced, footprint = _replaced(module, record), _footprint(module, record)
    missing = replaced.missing(installed) if params["restore_replaced"] else {}
    changed = params["section"] in record.values or bool(missing)
    back = INSTALLED if params["restore_replaced"] and replaced.is_returning else None
    back = _plan_of_return(module, apt, replaced, missing, mine) if missing else back
    dragged = []
    if mine:
        plan, answer = apt.simulate(transaction.REMOVE + mine)
        if answer.code:
            transaction.fail(module, "The packages cannot be removed; nothing was changed.", answer, where="apt")
        dragged = [name for name in plan.removed if name not in mine]
    unneeded = [name for name in footprint.unneeded(apt, mine, installed) if name not in held]
    dragged += [name for name in back.dragged if name not in mine + dragged + unneeded] if back else []
    others = [name for name in back.changed if name in held and name not in mine] if back else []
    _refuse_dragged(module, dragged + others, held - set(mine), mine or list(missing), installed)
    unneeded = [name for name in unneeded if name not in dragged]
    for words in back.notes if back else []:
        module.warn(words)
    if not module.check_mode and changed:
        _take_back_holds(module, record, apt, installed)
        _remove(module, record, apt, mine, unneeded)
        if back:
            _put_back(module, apt, replaced, back, record)
        replaced.forget()
        record.values.pop(params["section"], None)
        record.save()
    gone = mine + unneeded + dragged
    before = "".join("{} {}\n".format(name, installed[name]) for name in gone)
    after = "".join("{} {}\n".format(*pair) for pair in (back.versions.items() if back else ()))
    header = {"before_header": "packages", "after_header": "packages"}
    module.exit_json(
        changed=changed,
        removed=gone,
        restored=after.splitlines(),
        notes=back.notes if back else [],
        diff=dict(before=before, after=after, **header),
    )


def _refuse_when_busy(module, mine):
    """Fail the module, before anything is changed, if containers or GPU processes run that depend on the packages."""
    why = engine_use.all_that_runs() if mine and not module.params["restart_when_busy"] else ""
    if why:
        module.fail_json(
            msg=explain(
                "Packages that containers stand on are not removed: that would stop what runs.",
                where=", ".join(mine),
                expected="no containers, and no processes on GPUs",
                found=why,
                next_step="end it and run again, or set {}_restart_when_busy: true".format(module.params["section"]),
            )
        )


def _plan_of_return(module, apt, replaced, missing, mine):
    """Return how the packages come back that the kit replaced. Fail before anything is removed if they cannot."""
    with apt.own_lists() if module.check_mode else contextlib.nullcontext():
        update = apt.run(["-o", "Acquire::Retries=2", "update"])
        found = apt_output.problems(update.out + update.err)
        plan = replaced.plan(apt, missing, mine)
        if plan.versions and not plan.answer.code and not module.check_mode:
            # What is on this host's disk cannot be missing once the engine is gone.
            answer = apt.run(["install", "--download-only"] + plan.words + [name + "-" for name in mine])
            plan = plan._replace(answer=answer)
    if plan.answer.code:
        refuse(module, plan, "\n".join("{}: {}".format(*problem) for problem in found), missing)
    return plan


def _take_back_holds(module, record, apt, installed):
    params = module.params
    holds = record.values.pop(_key(params, "holds"), {})
    holds.update(dict.fromkeys(record.values.pop(_key(params, "also_held"), []), False))
    for verb, wanted in (("hold", True), ("unhold", False)):
        names = [name for name in holds if name in installed and holds[name] == wanted]
        answer = apt.mark(verb, names) if names else None
        if answer and answer.code:
            transaction.fail(module, "The hold cannot be taken back.", answer, where="apt-mark")


def _remove(module, record, apt, mine, unneeded):
    if mine:
        apt.mark("unhold", mine)
        answer = apt.run(transaction.REMOVE + mine + unneeded)
        if answer.code and any(name in transaction.packages()[0] for name in mine):
            transaction.fail(module, "The packages cannot be removed.", answer, where="apt")
    for words in _footprint(module, record).sweep(apt, record.values.get(module.params["section"], [])):
        module.warn(words)


def _put_back(module, apt, replaced, back, record):
    record.values[module.params["section"]] = []
    record.save()  # the kit's packages are gone; a run after a failure goes on from here
    answer = replaced.put_back(apt, back)
    if answer is not None and answer.code:
        transaction.fail(
            module,
            "The kit's packages are removed, and those that they had replaced cannot be installed.",
            answer,
            where="apt: " + ", ".join(back.versions),
            step="correct what apt names, then run the same command again: it goes on from here",
        )


if __name__ == "__main__":
    main()

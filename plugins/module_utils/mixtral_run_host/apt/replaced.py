"""Packages of a host that the kit replaced: recorded before they go, and installed again when the kit is taken back."""

from __future__ import annotations

from collections import namedtuple

from ..commands import run
from . import transaction
from .kept_files import KeptFiles, conffiles

Return = namedtuple("Return", "words versions notes answer dragged changed")
"""How packages come back. words: of `apt-get install`. versions: by name. notes: sentences on versions that the archive no
longer has. answer: of the simulation. dragged: all packages that the installation would remove. changed: all packages whose
version it would change."""
INSTALLED = Return([], {}, [], None, [], {})
"""The packages are installed again. `put_back` still restores their marks and services."""
_OPTIONS = ["--no-install-recommends", "--allow-downgrades", "--allow-change-held-packages"]


class Replaced:
    """The packages that the installation of a section removed, with their marks, services and configuration files.

    files: configuration files of the host that packages of the section would take over. units: services of both.
    """

    def __init__(self, record, section, files=(), units=()):
        self._record, self._key = record, section + "_replaced"
        self._files, self._units = files, units
        self.kept = KeptFiles(record, section)

    def note(self, gone, fresh, installed, held, apt):
        """Record packages before they are removed. The caller saves the record before it changes anything.

        gone: packages of the host that the transaction removes. fresh: those that the kit installs for the first time.
        """
        self.kept.note(sorted(set(self._files if fresh or gone else ()) | set(conffiles(gone))))
        if not gone:
            return
        automatic, offered = apt.automatic(gone), apt.offered(gone)
        values = self._record.values.setdefault(self._key, {"packages": {}})
        # An earlier run was cut off after it had removed some of them: the services are no longer as they were.
        is_continued = any(not installed.get(name) for name in values["packages"])
        for name in gone:
            values["packages"][name] = {
                "version": installed[name],
                "automatic": name in automatic,
                "held": name in held,
                "offered": name in offered,
            }
        if not is_continued:
            values["units"] = {unit: [_ask("is-enabled", unit), _ask("is-active", unit)] for unit in self._units}

    @property
    def is_returning(self):
        """Return True if an earlier run began to install the packages again, and did not come to its end."""
        return self._record.values.get(self._key, {}).get("returning", False)

    def missing(self, installed):
        """Return {name: version} of the recorded packages that are not installed."""
        packages = self._record.values.get(self._key, {}).get("packages", {})
        return {name: packages[name]["version"] for name in sorted(packages) if not installed.get(name)}

    def plan(self, apt, missing, mine):
        """Return how the missing packages come back while `mine` go: at their version, or else at the archive's."""
        offered = apt.offered(list(missing))
        packages = self._record.values[self._key]["packages"]
        lost = [name for name in missing if name not in offered and not packages[name]["offered"]]
        names = [name for name in missing if name not in lost]
        exact = [name + ("=" + missing[name] if missing[name] in offered.get(name, ()) else "") for name in names]
        removed = [name + "-" for name in mine]
        simulated, answer = apt.simulate(["install"] + _OPTIONS + exact + removed)
        words = exact
        if answer.code and exact != names:
            # A package at its old version may not go with another at a newer one.
            simulated, answer = apt.simulate(["install"] + _OPTIONS + names + removed)
            words = names if not answer.code else exact
        versions = {name: offered.get(name, [""])[0] if name in words else missing[name] for name in names}
        said = (
            "{} {} comes back as {}: the archive no longer has the old version, or it does not fit the other packages"
        )
        other = [name for name in names if missing[name] and versions[name] != missing[name]]
        notes = [said.format(name, missing[name], versions[name] or "the archive's version") for name in other]
        said = "{} {} does not come back: it came from no archive of this host when it was replaced"
        notes += [said.format(name, missing[name] or "") for name in lost]
        dragged, changed = ([], {}) if answer.code else (simulated.removed, simulated.changed)
        return Return(_OPTIONS + words, versions, notes, answer, dragged, changed)

    def put_back(self, apt, plan):
        """Install the packages of a plan, with their files, marks and services. Return the answer of apt-get.

        The files are there before the packages, which leave a file of the host as it is.
        """
        self._record.values[self._key]["returning"] = True
        self._record.save()  # if this run is cut off, the next one still restores marks and services
        self.kept.restore()
        answer = apt.run(["install"] + plan.words) if plan.versions else None
        if answer is not None and answer.code:
            return answer
        self.kept.restore()
        packages, installed = self._record.values[self._key]["packages"], transaction.packages()[0]
        # Those that an earlier run has installed, too.
        back = [name for name in sorted(packages) if installed.get(name)]
        if not back:
            return answer
        for verb, key in (("auto", "automatic"), ("hold", "held")):
            names = [name for name in back if packages[name][key]]
            if names:
                apt.mark(verb, names)
        for unit, (enabled, active) in sorted(self._record.values[self._key].get("units", {}).items(), reverse=True):
            # A socket is stopped before its service, which it would start again.
            if enabled in ("enabled", "disabled") and _ask("is-enabled", unit) not in (enabled, ""):
                run(["systemctl", enabled[:-1], unit])
            if active in ("inactive", "failed") and _ask("is-active", unit) == "active":
                run(["systemctl", "stop", unit])
            elif active == "active" and _ask("is-active", unit) != "active":
                run(["systemctl", "start", unit], timeout=180)
        return answer

    def forget(self):
        """Take packages and files out of the record."""
        self._record.values.pop(self._key, None)
        self.kept.forget()


def refuse(module, plan, problems, missing):
    """Fail the module because packages cannot come back. Nothing was removed yet."""
    section = module.params["section"]
    transaction.fail(
        module,
        "The packages that the kit replaced on this host cannot be installed again, so its own are not removed; nothing "
        "was changed by this task.",
        plan.answer,
        where="apt: " + ", ".join(" ".join(filter(None, each)) for each in missing.items()),
        more=problems,
        step="make the archives of the host answer (`sudo apt-get update`), then run again; or let the kit go without what "
        "it replaced: {}_restore_replaced: false".format(section),
    )


def _ask(verb, unit):
    return run(["systemctl", verb, unit]).out.strip().partition("\n")[0]

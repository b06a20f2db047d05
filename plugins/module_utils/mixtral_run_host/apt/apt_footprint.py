"""What packages bring along and what their programs leave behind, so that a removal leaves the host as it was."""

from __future__ import annotations

import grp
import os
import stat

from ..commands import last_lines, run
from .kept_files import KeptFiles


class Footprint:
    """Dependencies, settings, folders and groups that came with the packages of a section of the record.

    leftovers: files and folders that the packages' programs create. A file goes, a folder only if it is empty.
    groups: groups that the packages create. What was on the host before the packages stays.
    """

    def __init__(self, record, section, leftovers, groups):
        self._record, self._key = record, section + "_footprint"
        self._kept = KeptFiles(record, section)
        self._leftovers, self._groups = leftovers, groups

    def note(self, fresh, plan_new):
        """Record what is there before packages are installed. The caller saves the record before it installs them.

        fresh: packages that the kit installs for the first time. plan_new: all packages that apt would add.
        """
        if not fresh:
            return
        values = self._record.values.setdefault(self._key, {})
        if "leftovers" not in values:
            values["leftovers"] = [path for path in self._leftovers if os.path.lexists(path)]
            values["groups"] = [name for name in self._groups if _group(name)]
        configured = _with_settings_only()
        values["settings"] = sorted(set(values.get("settings", [])) | (configured & set(fresh + plan_new)))
        values["brought"] = sorted(set(values.get("brought", [])) | set(plan_new) - set(fresh))

    def unneeded(self, apt, mine, installed):
        """Return the packages that came as dependencies and that nothing needs once `mine` are gone, held or not."""
        brought = set(self._record.values.get(self._key, {}).get("brought", [])) & set(installed)
        if not mine or not brought:
            return []
        words = ["autoremove", "--allow-change-held-packages", "-o", "APT::Ignore-Hold=true"]
        plan, _ = apt.simulate(words + mine)
        return sorted(brought & set(plan.removed) - set(mine))

    def sweep(self, apt, names):
        """Remove what packages leave behind that were removed, `names` and their dependencies. Return warnings.

        A configuration file that somebody changed, or had there before the packages, stays.
        """
        values = self._record.values.get(self._key)
        if values is None:
            return []
        for path in self._leftovers:
            if path not in values.get("leftovers", []):
                _discard(path)
        warnings = []
        gone = (set(names) | set(values.get("brought", []))) & _with_settings_only()
        purged = sorted(gone - set(values.get("settings", [])))
        if purged:
            self._kept.note_changed(purged)
            if self._kept.paths:
                self._record.save()  # a run that is killed after the purge still knows them
            answer = apt.when_free(lambda: run(["dpkg", "--purge"] + purged, timeout=300))
            if answer.code:
                words = "The settings of removed packages stay: {}"
                warnings.append(words.format(last_lines(answer, 2)))
        for path in self._leftovers:  # folders that held settings
            if path not in values.get("leftovers", []):
                _discard(path)
        stays = self._kept.restore()
        if stays:
            warnings.append("Files of this host, not of the kit, stay: {}".format(", ".join(stays)))
        for name in self._groups:
            group = _group(name)
            if name not in values.get("groups", []) and group and not group.gr_mem:
                run(["groupdel", name])
        del self._record.values[self._key]
        return warnings


def _with_settings_only():
    """Return the packages that are removed and whose settings are still there."""
    answer = run(["dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n"])
    rows = [line.split() for line in answer.out.splitlines()]
    return {row[0] for row in rows if row[-1] == "config-files"}


def _discard(path):
    """Remove a file, or a folder if it is empty."""
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            os.rmdir(path)
        else:
            os.unlink(path)
    except OSError:
        pass  # it is not there, or holds something of somebody else


def _group(name):
    try:
        return grp.getgrnam(name)
    except KeyError:
        return None

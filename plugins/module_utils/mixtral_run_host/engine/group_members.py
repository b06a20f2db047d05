"""Members of the group docker: whom the kit adds, and which of them it may take out again."""

from __future__ import annotations

import glob
import grp
import os
import pwd

from ..files import read_text

GROUP = "docker"
OF_A_LOGIN = {"systemd", "(sd-pam)", "sshd", "sshd-session", "sftp-server", "dbus-daemon"}
"""Processes that belong to a login itself, and continue without the user's work."""


class Members:
    """What to change in the group, by name of user, each list in order.

    add: users to add. leave: members that only the kit added and that are no longer listed. busy: those of them that
    keep their place because their processes run, with the words for it. listed, once: what the record holds afterwards.
    """

    def __init__(self, values, listed, once, members):
        """Compare the record of the kit (`values`) with docker_users (`listed`) and docker_add_users (`once`)."""
        self.add = [user for user in dict.fromkeys(list(listed) + list(once)) if user not in members]
        mine = [user for user in values.get("users", []) if user in members]
        earlier = [user for user in values.get("users_once", []) if user in members]
        own = set(mine) | set(earlier) | set(self.add)
        self.busy = {}
        self.leave = []
        for user in mine:
            if user not in listed and user not in once:
                work = running_work(user)
                if work:
                    self.busy[user] = work
                else:
                    self.leave.append(user)
        self.listed = [user for user in dict.fromkeys(list(listed) + list(self.busy)) if user in own]
        kept = dict.fromkeys(earlier + [user for user in once if user in own])
        self.once = [user for user in kept if user not in self.listed]

    @property
    def phrases(self):
        """The changes, one sentence part for each user."""
        added = ["added {} to group {}".format(user, GROUP) for user in self.add]
        return added + ["took {} out of group {}".format(user, GROUP) for user in self.leave]


def recorded(values):
    """Return all users that the kit added, and remove them from the record."""
    return list(dict.fromkeys(values.pop("users", []) + values.pop("users_once", [])))


def members():
    """Return the members of the group, also those whose main group it is; None if there is no such group."""
    try:
        group = grp.getgrnam(GROUP)
    except KeyError:
        return None
    return set(group.gr_mem) | {user.pw_name for user in pwd.getpwall() if user.pw_gid == group.gr_gid}


def exists(user):
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def running_work(user):
    """Return which processes of a user run, in containers too, apart from a login and this module; empty for none."""
    try:
        uid = pwd.getpwnam(user).pw_uid
    except KeyError:
        return ""
    mine, names = _ancestors(), []
    for folder in glob.glob("/proc/[0-9]*"):
        try:
            if os.stat(folder).st_uid != uid or os.path.basename(folder) in mine:
                continue
            name = read_text(folder + "/comm", "").strip()
        except OSError:
            continue  # it has ended in the meantime
        if name and name not in OF_A_LOGIN:
            names.append(name)
    return ", ".join(sorted(set(names))[:5])


def _ancestors():
    """Return the IDs of this process and of those that it comes from: the connection of Ansible."""
    found, pid = set(), str(os.getpid())
    while pid not in found and pid != "0":
        found.add(pid)
        # The name of the program, in brackets, may hold blanks.
        fields = read_text("/proc/{}/stat".format(pid), ") ? 0").rpartition(")")[2].split()
        pid = fields[1]
    return found

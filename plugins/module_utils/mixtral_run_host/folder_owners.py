"""Owners of folders that the kit uses: which folders are somebody else's, and owner, group and mode as words."""

from __future__ import annotations

import grp
import json
import os
import pwd
import stat

from .files import explain
from .folders import open_folder


def of_others(paths, known, uid, mode):
    """Return (path, what it is, what was expected) of each folder that holds something and is somebody else's.

    known: folders that the kit made or changed before, or may take over. uid, mode: which the folders are to get.

    A data disk that outlived the system has the folders of an earlier setup, whose record went with the system. They have
    the owner that the kit gave them, whoever has this number now, so a folder of `uid` is not refused. One that only its
    owner may read is, if `mode` would open it to all users.
    """
    known = {os.path.normpath(path) for path in known}
    found = []
    for path in paths:
        if os.path.normpath(path) in known:
            continue
        try:
            folder = open_folder(path)
        except FileNotFoundError:
            continue
        try:
            now = os.fstat(folder)
            # An empty file system holds lost+found.
            is_empty = not set(os.listdir(folder)) - {"lost+found"}
        finally:
            os.close(folder)
        if is_empty:
            continue
        if now.st_uid != uid:
            found.append((path, words_of(now), "an empty folder, or one of user {}".format(_user(uid))))
        elif not now.st_mode & stat.S_IRWXO and mode & stat.S_IRWXO:
            found.append((path, words_of(now), "a mode that keeps other users out, as the folder has"))
    return found


def refusal(used, section):
    """Return the message about folders that `of_others` found."""
    return explain(
        "Folders hold data of somebody else and are not taken over; nothing was changed.",
        expected=", and ".join(dict.fromkeys(expected for _, _, expected in used)),
        found="; ".join("{}: {}".format(path, found) for path, found, _ in used),
        next_step="name another path; or let owner, group and mode of these folders (not of what is in them) change: "
        "-e '{{\"{}_take_over\": {}}}'".format(section, json.dumps([path for path, _, _ in used])),
    )


def words_of(now):
    """Return owner, group and mode of an os.stat_result as words."""
    return words(now.st_uid, now.st_gid, now.st_mode)


def words(uid, gid, mode):
    return "owner {}, group {}, mode {:04o}".format(_user(uid), _group(gid), stat.S_IMODE(mode))


def diff(path, before, after):
    """Return a change of a folder for --diff. before, after: words, or empty for no folder."""
    lines = [text.replace(", ", "\n") + "\n" if text else "" for text in (before, after)]
    return {"before_header": path, "after_header": path, "before": lines[0], "after": lines[1]}


def _user(uid):
    try:
        return "{} ({})".format(uid, pwd.getpwuid(uid).pw_name)
    except KeyError:
        return str(uid)


def _group(gid):
    try:
        return "{} ({})".format(gid, grp.getgrgid(gid).gr_name)
    except KeyError:
        return str(gid)

#!/usr/bin/python
"""Create folders and files of secrets with owner, group and mode. `absent` removes created folders that are empty."""

from __future__ import annotations

DOCUMENTATION = """
module: owned_folders
short_description: Create folders with owner, group and mode that a container's user can write to
description:
  - The owner may be a number that no user of the host has. The contents of the folders are left alone.
  - A path that is not absolute, a folder of the system and the home of a user are refused.
  - A folder that holds something and belongs to another user is refused unless the kit made it, changed it before, or
    C(take_over) names it. So is one that only its owner may read, if C(mode) would open it to all users.
  - A path that leads through a link which root does not own is refused, because the owner of a folder could lead root
    elsewhere.
  - C(absent) removes folders that the kit created if they are empty, and secrets that the kit wrote. Folders that
    existed before get their owner, group and mode back. C(leftovers) are removed with their contents.
options:
  section: {description: Name under which the folders are recorded., type: str, required: true}
  paths: {description: Folders to create., type: list, elements: path, required: true}
  uid: {description: Owner., type: int, required: true}
  gid: {description: Group., type: int, required: true}
  mode: {description: "Mode, octal.", type: str, default: "2775"}
  take_over: {description: Folders of C(paths) whose owner and mode may change although they are somebody else's., type: list, elements: path, default: []}
  secret_path: {description: "File of mode 0640 for C(secret). Jobs run as the login user in this group.", type: path}
  secret:
    description:
      - Content of the file. If it is empty, an existing file stays. A byte order mark, blanks and quotes around it are
        removed.
      - The action plugin fills it from C(secret_file), a file on the operator's machine.
    type: str
    default: ""
  keys_path: {description: "File of mode 0640 for C(keys), which jobs read as C(secret_path).", type: path}
  keys:
    description:
      - Keys of an object store in the form of ~/.aws/credentials. If it is empty, an existing file stays.
      - The action plugin fills it from C(keys_file), a file on the operator's machine.
    type: str
    default: ""
  leftovers: {description: "Files and folders of the section that C(absent) removes.", type: list, elements: path, default: []}
  state: {description: C(absent) removes them., type: str, choices: [present, absent], default: present}
"""

import configparser
import contextlib
import hashlib
import os
import pwd
import shutil
import stat

from ..module_utils.mixtral_run_host import folder_owners
from ..module_utils.mixtral_run_host.files import Record, explain, replace_in
from ..module_utils.mixtral_run_host.folders import UnsafePath, naming, open_file, open_folder
from ..module_utils.mixtral_run_host.start import run_module

OPTIONS = {
    "section": {"type": "str", "required": True},
    "paths": {"type": "list", "elements": "path", "required": True},
    "uid": {"type": "int", "required": True},
    "gid": {"type": "int", "required": True},
    "mode": {"type": "str", "default": "2775"},
    "take_over": {"type": "list", "elements": "path", "default": []},
    "secret_path": {"type": "path"},
    "secret": {"type": "str", "default": "", "no_log": True},
    "keys_path": {"type": "path"},
    "keys": {"type": "str", "default": "", "no_log": True},
    "leftovers": {"type": "list", "elements": "path", "default": []},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
}

SECRET_MODE = 0o640
KEYS = ("aws_access_key_id", "aws_secret_access_key")
# fmt: off
SYSTEM = {
    "/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib64", "/media", "/proc", "/root", "/run",
    "/sbin", "/sys", "/tmp", "/usr", "/usr/local", "/var", "/var/cache", "/var/lib", "/var/log", "/var/run", "/var/tmp",
}
# fmt: on


def main():
    run_module(act, OPTIONS)


def act(module):
    if module.params["state"] == "present":
        _refuse_others(module)
    record, changes = Record("folders", check_mode=module.check_mode), []
    try:
        if module.params["state"] == "present":
            _refuse_others_data(module, record)
            done = _present(module, record, changes)
        else:
            done = _absent(module, record, changes)
    except UnsafePath as error:
        module.fail_json(
            msg=explain(
                "A folder is not used.",
                where=error.filename,
                expected="folders, or links that belong to root",
                found=error.strerror,
                next_step="remove the link, or create it anew as root",
            )
        )
    module.exit_json(
        changed=bool(done), done=done,
        shown=["{}: {} → {}".format(*change) for change in changes if change[1]],
        diff=[folder_owners.diff(*change) for change in changes],
    )  # fmt: skip


def _refuse_others(module):
    """Refuse all paths at once whose owner the kit must not change, also in check mode."""
    homes = {os.path.realpath(user.pw_dir): user.pw_name for user in pwd.getpwall()}
    found = []
    for path in module.params["paths"]:
        real = os.path.realpath(path)
        if not os.path.isabs(path):
            found.append(f"{path!r}, which is not absolute")
        elif real in SYSTEM or os.path.normpath(path) in SYSTEM:
            found.append(f"{path}, a folder of the system")
        elif real in homes:
            found.append(f"{path}, the home of {homes[real]}")
    if found:
        module.fail_json(
            msg=explain(
                "Folders are not used.",
                where=module.params["section"],
                expected="absolute paths of folders that are the kit's own: their owner and mode change",
                found="; ".join(found),
                next_step="name a folder below, or another one",
            )
        )


def _refuse_others_data(module, record):
    """Refuse, before anything changes, all folders that hold something and that somebody else seems to use."""
    params = module.params
    mine = record.values.get(params["section"], {})
    known = list(mine.get("folders", [])) + list(mine.get("before", {})) + params["take_over"]
    used = folder_owners.of_others(params["paths"], known, params["uid"], int(params["mode"], 8))
    if used:
        module.fail_json(msg=folder_owners.refusal(used, params["section"]))


def _present(module, record, changes):
    params, done = module.params, []
    mine = record.values.setdefault(params["section"], {"folders": [], "secret": None})
    theirs = mine.setdefault("before", {})
    mode = int(params["mode"], 8)
    wanted = folder_owners.words(params["uid"], params["gid"], mode)
    for path in params["paths"]:
        try:
            folder = open_folder(path)
        except FileNotFoundError:
            done.append("made " + path)
            changes.append((path, "", wanted))
            if module.check_mode:
                continue
            missing = _missing_parents(path)
            mine["folders"] += [each for each in missing if each not in mine["folders"]]
            record.save()
            folder = open_folder(path, make=True)
        try:
            now = os.fstat(folder)
            if (now.st_uid, now.st_gid) != (params["uid"], params["gid"]) or stat.S_IMODE(now.st_mode) != mode:
                done.append("owner, group and mode of " + path)
                if path not in [change[0] for change in changes]:
                    changes.append((path, folder_owners.words_of(now), wanted))
                if not module.check_mode:
                    if path not in mine["folders"]:
                        theirs.setdefault(path, [now.st_uid, now.st_gid, stat.S_IMODE(now.st_mode)])
                        record.save()
                    with naming(path):
                        os.fchown(folder, params["uid"], params["gid"])
                        os.fchmod(folder, mode)  # after fchown, which clears the set-group-id bit
        finally:
            os.close(folder)
    # Both are looked at before one of them is written.
    texts = {"secret": _plain_secret(module), "keys": _plain_keys(module)}
    for name, text in texts.items():
        done += _secret(module, record, mine, name, text)
    return done


def _secret(module, record, mine, name, text):
    """Write a secret. If it had another path before, remove the file there, of which nobody would think again."""
    path, known = module.params[name + "_path"], mine.get(name)
    if not path or not text:
        return []
    text += "\n"
    owner = (module.params["uid"], module.params["gid"])
    written = _is_written(path, text, (SECRET_MODE,) + owner)
    former = mine.setdefault("former", {}).setdefault(name, {})
    digests = mine.setdefault("sha256", {})
    if known and known != path:
        former[known] = digests.get(name)
    former.pop(path, None)
    if known or not written:
        mine[name], digests[name] = path, _digest(text.encode())
        # First, so that no file is on the disk of which the record does not know.
        record.save()
    done = []
    if not written:
        done.append("wrote " + path)
        if not module.check_mode:
            with naming(path), _folder_of(path, make=True) as folder:
                replace_in(folder, os.path.basename(path), text, SECRET_MODE, owner)
    for old, digest in former.items():
        done += _remove_former(module, old, digest, path)
    former.clear()
    record.save()
    return done


def _remove_former(module, old, digest, path):
    """Remove a file of a secret that is now elsewhere, unless it is the same file or someone else's by now.

    digest: of what the kit wrote. Older records have none; there the mode has to do.
    """
    try:
        with _folder_of(old) as folder:
            handle = open_file(os.path.basename(old), folder)
            if handle is not None:
                with os.fdopen(handle, "rb") as file:
                    mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                    is_ours = mode == SECRET_MODE if digest is None else _digest(file.read(1 << 20)) == digest
                if is_ours and _is_same_place(folder, old, path):
                    return []
                if is_ours:
                    if not module.check_mode:
                        os.unlink(os.path.basename(old), dir_fd=folder)
                    return ["removed " + old]
    except FileNotFoundError:
        return []
    except OSError as error:
        module.warn("{} is left there, and may hold a secret: {}".format(old, error.strerror))
        return []
    module.warn("{} is left there: it is no longer the file that the kit wrote".format(old))
    return []


def _is_same_place(folder, old, path):
    """Return True if a path leads to the file of that folder, as over a link or another mount."""
    try:
        with _folder_of(path) as other:
            same = os.path.samestat(os.fstat(folder), os.fstat(other))
    except FileNotFoundError:  # in check mode
        return False
    return same and os.path.basename(old) == os.path.basename(path)


def _digest(content):
    return hashlib.sha256(content).hexdigest()


def _plain_secret(module):
    """Return the secret without what editors and shells add: byte order mark, blanks, ends of lines and quotes.

    Fail if more than one word is left, or a character that no HTTP header can hold. The message does not show it.
    """
    text = module.params["secret"].replace("\ufeff", "").strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    if not all("!" <= letter <= "~" and letter not in "\"'=" for letter in text):
        module.fail_json(
            msg=explain(
                "The token cannot be used; nothing of it was written.",
                where=module.params["secret_path"],
                expected="one word of letters and digits, such as hf_...",
                found="blanks, quotes, an equals sign, or characters that are not ASCII",
                next_step="write the token alone into the file that hf_cache_token_file or --hf-token-file names",
            )
        )
    return text


def _plain_keys(module):
    """Return the keys of a store without a byte order mark, and with the ends of lines of a host.

    Fail unless they are in the form that the client of S3 reads. The message does not show them.
    """
    text = module.params["keys"].replace("\ufeff", "").replace("\r\n", "\n").strip()
    if not text:
        return ""
    parser = configparser.RawConfigParser(default_section="")
    try:
        parser.read_string(text)
        missing = [name for name in KEYS if not parser.get("default", name, fallback="").strip()]
        found = " and ".join("no " + name for name in missing)
    except configparser.Error:
        found = "other lines than NAME = VALUE, or a name twice"
    if found:
        module.fail_json(
            msg=explain(
                "The keys of the store cannot be used; nothing of them was written.",
                where=module.params["keys_path"],
                expected="the form of ~/.aws/credentials: [default], {} = ..., {} = ...".format(*KEYS),
                found=found,
                next_step="correct the file that hf_cache_store_keys_file or --store-keys-file names",
            )
        )
    return text


def _is_written(path, text, wanted):
    """Return True if the file has this text and the `wanted` mode, owner and group."""
    try:
        with _folder_of(path) as folder:
            handle = open_file(os.path.basename(path), folder)
    except FileNotFoundError:
        return False
    if handle is None:
        return False
    with os.fdopen(handle, "rb") as file:
        now = os.fstat(file.fileno())
        found = file.read(len(text.encode()) + 1)
    return found == text.encode() and (stat.S_IMODE(now.st_mode), now.st_uid, now.st_gid) == wanted


@contextlib.contextmanager
def _folder_of(path, make=False):
    """Open the folder that holds `path`, for the time of a block."""
    folder = open_folder(os.path.dirname(path), make=make)
    try:
        yield folder
    finally:
        os.close(folder)


def _missing_parents(path):
    missing = []
    while not os.path.exists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing[::-1]


def _absent(module, record, changes):
    return _take_back(module, record, changes) + _clear(module)


def _clear(module):
    there = [path for path in module.params["leftovers"] if os.path.lexists(path)]
    for path in there if not module.check_mode else []:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    return ["removed " + path for path in there]


def _take_back(module, record, changes):
    mine = record.values.get(module.params["section"])
    if mine is None:
        return []
    done = ["forgot the folders of " + module.params["section"]]
    if module.check_mode:
        return done
    former = [path for paths in mine.get("former", {}).values() for path in paths]
    for path in [mine["secret"], mine.get("keys")] + former:
        if path and _is_removed(os.unlink, path):
            done.append("removed " + path)
    for path in sorted(mine["folders"], key=len, reverse=True):
        if _is_removed(os.rmdir, path):
            done.append("removed " + path)
    for path, (uid, gid, mode) in mine.get("before", {}).items():
        try:
            folder = open_folder(path)
        except (FileNotFoundError, NotADirectoryError, UnsafePath):
            continue  # the folder that the kit changed no longer exists
        try:
            changes.append((path, folder_owners.words_of(os.fstat(folder)), folder_owners.words(uid, gid, mode)))
            os.fchown(folder, uid, gid)
            os.fchmod(folder, mode)
        finally:
            os.close(folder)
        done.append("owner, group and mode of {} as they were".format(path))
    del record.values[module.params["section"]]
    record.save()
    return done


def _is_removed(remove, path):
    """Remove a file or an empty folder. Return False if it holds a user's data or no longer exists."""
    try:
        with _folder_of(path) as folder:
            remove(os.path.basename(path), dir_fd=folder)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()

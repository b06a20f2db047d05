"""Pure functions that read what apt prints: which source fails, and what a transaction would do."""

from __future__ import annotations

import re
from collections import namedtuple

Problem = namedtuple("Problem", "uri message")
"""A problem of `apt-get update`. uri: of the repository, or empty if apt names a file or nothing at all."""

Simulated = namedtuple("Simulated", "removed changed new")
"""What `apt-get --simulate` would do. removed: names. changed: {name: new version} of packages that are installed. new:
names of packages that are not installed yet."""

_URI = r"(?:[a-z+]+://|cdrom:|file:|copy:)[^\s'\"]+"
# apt stops reading its sources at these: no command works until the entry is gone.
_UNREADABLE = (
    r"E: Conflicting values set for option \S+ regarding source (?P<uri>" + _URI + r")",
    r"E: .*?(?P<file>/etc/apt/sources\.list\S*)",
)


def problems(text):
    """Return the problems of repositories in the output of `apt-get update`, one for each URI."""
    found = {}
    for line in text.splitlines():
        if not line.startswith(("E:", "W:", "Err:")):
            continue
        uri = re.search(_URI, line)
        if uri is None:
            continue
        message = re.sub(r"^(E|W|Err):\d*\s*", "", line).strip()
        # The first line of a repository is short ("Err:3 http://…"); the last ones give the reason.
        found.setdefault(_repository(uri.group()), []).append(message)
    return [Problem(uri, max(messages, key=len)) for uri, messages in sorted(found.items())]


def _repository(uri):
    """Return the URI of the repository that a file of it belongs to: …/dists/stable/InRelease."""
    return re.sub(r"/(dists/.*|(\./)?(In)?Release(\.gpg)?|(\./)?Packages(\.\w+)?)$", "", uri.rstrip(":,.")).rstrip("/")


def unreadable(text):
    """Return (URI, file, message) of the entry at which apt stops reading its sources, or None if it reads them all."""
    for line in text.splitlines():
        for pattern in _UNREADABLE:
            match = re.match(pattern, line)
            if match:
                named = match.groupdict()
                return named.get("uri") or "", named.get("file") or "", line[2:].strip()
    return None


def belongs_to(uri, repository):
    """Return True if `uri` is that of the repository, or of a file in it."""
    uri, repository = _bare(uri), _bare(repository)
    return bool(repository) and (uri == repository or uri.startswith(repository + "/"))


def _bare(uri):
    return re.sub(r"^[a-z+]+://", "", uri.strip()).rstrip("/")


def simulated(text):
    """Return what the output of `apt-get --simulate` says that would be done."""
    removed = re.findall(r"^(?:Remv|Purg) (\S+)", text, re.MULTILINE)
    changed = dict(re.findall(r"^Inst (\S+) \[[^\]]*\] \((\S+)", text, re.MULTILINE))
    new = re.findall(r"^Inst (\S+) \(", text, re.MULTILINE)
    return Simulated(
        [_name(each) for each in removed],
        {_name(name): version for name, version in changed.items()},
        [_name(each) for each in new],
    )


def _name(package):
    """Return the name of a package without its architecture."""
    return package.split(":")[0]


def files_naming(uri, texts):
    """Return the names of the source files that name a repository, in the order of `texts`, {name: text}."""
    found = []
    for name, text in texts.items():
        code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
        words = [word.replace("$(ARCH)", "amd64") for word in re.findall(_URI, code)]
        if any(_bare(word) == _bare(uri) or belongs_to(uri, word) for word in words):
            found.append(name)
    return found


def broken_packages(text):
    """Return the packages that dpkg says it cannot configure or unpack."""
    found = re.findall(r"^dpkg: error processing (?:package|archive) (\S+)", text, re.MULTILINE)
    return sorted({_name(each) for each in found})


_BUSY = "another package manager runs: wait, or raise ..._lock_timeout_seconds"
_NEXT_STEPS = {
    "locked by another process": _BUSY,
    "Could not get lock": _BUSY,
    "was not found": "pin a version that the repository offers:\n{}",
    "is not readable by user": "let everyone read the key and its folder: `sudo chmod 755 /etc/apt/keyrings; "
    "sudo chmod 644 /etc/apt/keyrings/*`",
    "is not bound": "the key binds itself with SHA-1, which this system refuses: use a mirror that signs with a newer key",
    "NO_PUBKEY": "the repository is signed with another key than the pinned one",
    "dpkg was interrupted": "`sudo dpkg --configure -a` on the host, then run again",
    "unmet dependencies": "`sudo apt-get --fix-broken install` on the host shows what is broken there, then run again",
    "Read-only file system": "mount the file system writable; after an error of the disk the kernel mounts it read-only",
}


def next_step(text, offered):
    """Return what to do about a failure of apt or dpkg, by their words. offered: versions of the wanted packages."""
    steps = (step.format(offered) for words, step in _NEXT_STEPS.items() if words in text)
    return next(steps, "run it by hand on the host to see more")

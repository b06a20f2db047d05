"""Pure functions that read and write the text of apt's source files."""

from __future__ import annotations

import re

DISABLED = "# mixtral-run: the same repository is in {}; two entries with different keys make apt fail\n"


def render(fields):
    """Return a deb822 stanza from (name, value) pairs, without empty values."""
    return "".join("{}: {}\n".format(name, value) for name, value in fields if value)


def expand(text, os_release, architecture):
    """Replace `{id}`, `{release}`, `{codename}` and `{arch}` in `text` by the values of the host.

    The release is the version without dots, as in the names of NVIDIA's repositories: ubuntu2204, debian12.
    """
    values = {"id": os_release["id"], "codename": os_release["codename"], "arch": architecture}
    values["release"] = os_release.get("version", "").replace(".", "")
    return re.sub(r"\{(id|release|codename|arch)\}", lambda match: values[match.group(1)], text)


def same_repository(first, second):
    """Return True if two URIs name the same repository, apart from their scheme and final slash."""
    return _bare(first) == _bare(second)


def _bare(uri):
    return re.sub(r"^[a-z+]+://", "", uri.strip()).rstrip("/").replace("$(ARCH)", "amd64")


def without(text, uri, name, keeper):
    """Return the text of the source file `name` with every entry for `uri` disabled, or the same text if there is none.

    Entries of a one-line file are commented out; a deb822 stanza gets `Enabled: no`.
    """
    if name.endswith(".sources"):
        return _stanzas_without(text, uri, keeper)
    lines = []
    for line in text.splitlines(keepends=True):
        entry = re.match(r"\s*deb(?:-src)?\s+(?:\[[^\]]*\]\s*)?(\S+)", line)
        if entry and same_repository(entry.group(1), uri):
            line = DISABLED.format(keeper) + "# " + line
        lines.append(line)
    return "".join(lines)


def _stanzas_without(text, uri, keeper):
    stanzas = re.split(r"(\n[ \t]*\n)", text)
    for number in range(0, len(stanzas), 2):
        uris = re.search(r"^URIs:(.*(?:\n[ \t]+\S.*)*)", stanzas[number], re.MULTILINE | re.IGNORECASE)
        off = re.search(r"^Enabled:\s*(no|false|0)", stanzas[number], re.MULTILINE | re.IGNORECASE)
        if uris and not off and any(same_repository(word, uri) for word in uris.group(1).split()):
            kept = re.sub(r"^Enabled:.*\n?", "", stanzas[number], flags=re.MULTILINE | re.IGNORECASE)
            # Insert after leading blank lines: a blank line within the stanza would end it.
            start = len(kept) - len(kept.lstrip())
            stanzas[number] = kept[:start] + DISABLED.format(keeper) + "Enabled: no\n" + kept[start:]
    return "".join(stanzas)

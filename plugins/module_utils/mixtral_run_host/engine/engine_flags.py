"""Pure functions on the command line of dockerd, and on what of daemon.json it leaves to the kit.

dockerd refuses to start if a setting is both in daemon.json and on its command line, even with the same value.
"""

from __future__ import annotations

import copy
import json
import shlex
from collections import namedtuple

# Flags without a value (moby, cmd/dockerd/config.go and config_unix.go). `--name value` gives all others one.
_SWITCHES = frozenset(
    (
        "allow-direct-routing", "debug", "experimental", "help", "icc", "init", "ip-forward", "ip-forward-no-drop",
        "ip-masq", "ip6tables", "iptables", "ipv6", "live-restore", "no-new-privileges", "raw-logs", "rootless",
        "selinux-enabled", "tls", "tlsverify", "userland-proxy", "validate", "version",
    )
)  # fmt: skip
_SHORT = {
    "b": "bridge", "D": "debug", "G": "group", "g": "data-root", "H": "host", "l": "log-level", "p": "pidfile",
    "s": "storage-driver",
}  # fmt: skip
# Flags that may be repeated have another name in daemon.json (moby, opts.NamedOption).
_KEYS = {
    "add-runtime": "runtimes", "authorization-plugin": "authorization-plugins", "cdi-spec-dir": "cdi-spec-dirs",
    "default-address-pool": "default-address-pools", "default-ulimit": "default-ulimits", "exec-opt": "exec-opts",
    "dns-opt": "dns-opts", "feature": "features", "graph": "data-root", "host": "hosts",
    "insecure-registry": "insecure-registries", "label": "labels", "log-opt": "log-opts",
    "node-generic-resource": "node-generic-resources", "registry-mirror": "registry-mirrors",
    "storage-opt": "storage-opts",
}  # fmt: skip
Settled = namedtuple("Settled", "settings kept conflicts")
"""What to merge into daemon.json; settings of the host that stay instead of the kit's; and what cannot be reconciled."""


def expand(words, environment):
    """Return the words of an ExecStart line with $NAME and ${NAME} replaced as systemd does it."""
    found = []
    for word in words:
        if word.startswith("$") and not word.startswith("${"):
            found += _split(environment.get(word[1:], ""))  # a whole word becomes any number of words
        else:
            for name, value in environment.items():
                word = word.replace("${" + name + "}", value)
            found.append(word)
    return found


def _split(text):
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def flags(words):
    """Return the settings on dockerd's command line, {key of daemon.json: list of values as text}."""
    found = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
        elif word.startswith("-") and len(word) > 1 and word[1] in _SHORT:
            name, value = _SHORT[word[1]], word[2:].lstrip("=")
            equals = bool(value)
        else:
            continue
        if not equals:
            value = "true" if name in _SWITCHES or not words else words.pop(0)
        found.setdefault(_KEYS.get(name, name), []).append(value)
    return found


def settle(settings, defaults, needed, current, owned, given):
    """Decide what of the kit's settings goes into daemon.json.

    Args:
        settings: what the operator asks for; it replaces values of the host.
        defaults: what the kit prefers; a value of the host stays instead.
        needed: as settings, but another value of the host is a conflict: replacing it would hide what is stored there.
        current: content of daemon.json.
        owned: entries of the kit's section, see daemon_settings.
        given: the result of flags().

    Returns: Settled. A conflict is (expected, found, next step).
    """
    mine = {tuple(entry["path"]): entry for entry in owned}
    kept, conflicts, wanted = [], [], {}
    for key, value in dict(needed, **settings).items():
        if key not in given:
            other = current.get(key)
            if key in needed and key not in settings and other not in (None, value) and (key,) not in mine:
                conflicts.append(_conflict(key, value, "{!r} in daemon.json, set by somebody".format(other),
                                           "use the host's value, or move what is stored there and remove it"))  # fmt: skip
            wanted[key] = value
        elif not _is_given(value, given[key]):
            step = "take {} out of the unit (`systemctl cat docker.service`), or leave it out of the role's settings"
            conflicts.append(_conflict(key, value, _flag(key, given[key]), step.format("the flag")))
    defaults = dict(defaults)
    driver = settings.get("log-driver") or (given.get("log-driver") or [_foreign(current, ("log-driver",), mine)])[-1]
    if driver and driver != defaults.get("log-driver"):
        defaults.pop("log-opts", None)  # another driver does not start with options that it does not know
    for key, value in defaults.items():
        if key in given:
            kept += [] if key in settings else [_flag(key, given[key])]
            continue
        missing = _missing(value, current, (key,), mine, kept)
        if missing is not None:
            wanted[key] = _overlaid(missing, wanted[key]) if key in wanted else missing
    for key in sorted(set(given) & set(current)):
        if set(_paths(current[key], (key,))) - set(mine):  # what is the kit's alone is taken out again
            conflicts.append(
                ("{} in one place only".format(key), "{}, and in daemon.json as well".format(_flag(key, given[key])),
                 "remove one of them: the engine does not start with both")
            )  # fmt: skip
    return Settled(copy.deepcopy(wanted), kept, conflicts)


def _overlaid(below, above):
    """Return `above`, with what only `below` has where both are dicts."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    both = {key: _overlaid(below[key], above[key]) for key in below if key in above}
    return dict(below, **dict(above, **both))


def _missing(value, current, path, mine, kept):
    """Return what of a default the host does not set itself, or None. Add to `kept` what it does."""
    if isinstance(value, dict) and value and not isinstance(_at(current, path), (str, int, float, list, bool)):
        found = {}
        for key, part in value.items():
            missing = _missing(part, current, path + (key,), mine, kept)
            if missing is not None:
                found[key] = missing
        return found or None
    theirs = _foreign(current, path, mine)
    if theirs is None:
        return value
    if theirs != value:
        kept.append("{} {}".format(".".join(path), json.dumps(theirs)))
    return None


def _foreign(current, path, mine):
    """Return the host's own value at a path of daemon.json, or None if there is none. A value of the kit is not."""
    entry = mine.get(path)
    if entry is not None:
        return entry.get("before")
    return _at(current, path)


def _at(settings, path):
    for key in path:
        if not isinstance(settings, dict):
            return None
        settings = settings.get(key)
    return settings


def _paths(value, path):
    if isinstance(value, dict) and value:
        return [each for key, part in value.items() for each in _paths(part, path + (key,))]
    return [path]


def _is_given(value, texts):
    """Return True if the flags set the same value."""
    if isinstance(value, bool):
        return texts[-1].lower() == str(value).lower()
    if isinstance(value, list):
        return set(map(str, value)) <= set(texts)
    if isinstance(value, dict):
        return all("{}={}".format(name, part) in texts for name, part in value.items())
    return texts[-1] == str(value)


def _flag(key, texts):
    names = {key_of: name for name, key_of in _KEYS.items() if name != "graph"}
    return "the unit's flag --{}={}".format(names.get(key, key), texts[-1])


def _conflict(key, value, found, step):
    return "{} {}".format(key, json.dumps(value)), found, step

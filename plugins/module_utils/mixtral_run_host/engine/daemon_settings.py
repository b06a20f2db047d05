"""Pure functions on JSON values that merge settings into daemon.json and remove them again.

`owned` is a list of entries, one for each value that the kit added:
  {"path": ["log-opts", "max-size"], "value": "100m", "before": …}   a value; "before" only if it replaced another
  {"path": ["registry-mirrors"], "items": ["https://…"]}             items added to a list
"""

from __future__ import annotations

import copy

# `systemctl reload docker` applies these; every other key needs a restart (moby, daemon/config/config.go: reload).
# A reload also reads "features", but its usual settings, cdi and containerd-snapshotter, take effect at the start only.
RELOADABLE = frozenset(
    (
        "allow-nondistributable-artifacts",
        "authorization-plugins",
        "debug",
        "default-runtime",
        "insecure-registries",
        "labels",
        "live-restore",
        "max-concurrent-downloads",
        "max-concurrent-uploads",
        "max-download-attempts",
        "registry-mirrors",
        "runtimes",
        "shutdown-timeout",
    )
)


def merge(current, wanted, owned):
    """Return `current` with `wanted` merged in recursively, and the entries that the kit then owns. Change no argument.

    Entries of `owned` that `wanted` no longer has are removed first, unless somebody has changed them since. Values
    that the host already had are not owned by the kit. An empty `wanted` removes everything that is owned.
    """
    settings = copy.deepcopy(current)
    leaves = dict(_leaves(wanted))
    still_owned = {}
    for entry in owned:
        path = tuple(entry["path"])
        if path in leaves and isinstance(leaves[path], list) == ("items" in entry):
            still_owned[path] = entry
            if "items" in entry:
                still_owned[path] = _release_items(settings, entry, leaves[path])
        else:
            _take_back(settings, entry)
    for path, value in leaves.items():
        entry = _put(settings, path, value, still_owned.get(path))
        if entry:
            still_owned[path] = entry
    return settings, [still_owned[path] for path in sorted(still_owned)]


def needs(before, after):
    """Return the action that a change of the file needs, "none", "reload" or "restart", and the keys that differ."""
    keys = sorted(key for key in set(before) | set(after) if before.get(key) != after.get(key))
    if not keys:
        return "none", keys
    return ("reload" if RELOADABLE.issuperset(keys) else "restart"), keys


def _leaves(settings, path=()):
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, path + (key,))
        else:
            yield path + (key,), value


def _parent(settings, path, create=False):
    for key in path[:-1]:
        if not isinstance(settings.get(key), dict):
            if not create:
                return None
            settings[key] = {}
        settings = settings[key]
    return settings


def _put(settings, path, value, entry):
    parent = _parent(settings, path, create=True)
    key = path[-1]
    if isinstance(value, list):
        return _put_items(parent, path, value, entry)
    if isinstance(value, dict) and isinstance(parent.get(key), dict):
        return entry  # an empty object is wanted, and an object exists
    if key in parent and parent[key] == value and type(parent[key]) is type(value):
        return entry
    fresh = {"path": list(path), "value": value}
    if entry and "before" in entry:
        fresh["before"] = entry["before"]
    elif not entry and key in parent:
        fresh["before"] = parent[key]
    parent[key] = copy.deepcopy(value)
    return fresh


def _put_items(parent, path, value, entry):
    key = path[-1]
    existed = isinstance(parent.get(key), list)
    there = parent[key] if existed else []
    added = [item for item in value if item not in there]
    if existed and not added:
        return entry
    parent[key] = there + added
    return {"path": list(path), "items": (entry or {}).get("items", []) + added}


def _release_items(settings, entry, wanted):
    parent = _parent(settings, entry["path"])
    dropped = [item for item in entry["items"] if item not in wanted]
    key = entry["path"][-1]
    if parent is not None and isinstance(parent.get(key), list):
        parent[key] = [item for item in parent[key] if item not in dropped]
    return {"path": entry["path"], "items": [item for item in entry["items"] if item in wanted]}


def _take_back(settings, entry):
    path = entry["path"]
    parent = _parent(settings, path)
    key = path[-1]
    if parent is None or key not in parent:
        return
    if "items" in entry:
        if isinstance(parent[key], list):
            parent[key] = [item for item in parent[key] if item not in entry["items"]]
            if not parent[key]:
                del parent[key]
    elif parent[key] != entry["value"]:
        return  # somebody has changed the value since, so the kit no longer owns it
    elif "before" in entry:
        parent[key] = entry["before"]
    else:
        del parent[key]
    _drop_empty(settings, path)


def _drop_empty(settings, path):
    for depth in range(len(path) - 1, 0, -1):
        parent = _parent(settings, path[:depth])
        if parent is None or parent.get(path[depth - 1]) != {}:
            return
        del parent[path[depth - 1]]

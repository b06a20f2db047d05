"""The IDs of the image in an archive that comes from another host, from its bytes, before an engine reads it."""

from __future__ import annotations

import hashlib
import json
import posixpath
import tarfile

from .blobs import CopyError

_MANIFEST_BYTES = 16 << 20
_MOST_MEMBERS = 20_000
_MOST_END_BYTES = 1 << 20
_HOSTILE = "nothing was loaded; look at the host that it came from"
_NAMES = {"io.containerd.image.name", "org.opencontainers.image.ref.name"}
_KEYS = ("Config", "RepoTags", "Layers", "Parent", "LayerSources")
_OCI_KEYS = ("manifests", "config", "layers", "digest", "annotations", "platform", "os", "architecture", "mediaType")


def ids_in(path):
    """Return the IDs that engines may give to the one image of an archive; they follow from its bytes.

    An engine that stores images itself reads manifest.json and takes the SHA-256 of the configuration, which has the
    hashes of all layers. An engine that stores them in containerd reads index.json and takes the SHA-256 of the manifest,
    or of the list of manifests, that it names. Both are IDs of the same image only if the manifest names this
    configuration. Raise CopyError for an archive with several images or with names, because a load would give these names
    to what is in it, and for one that an engine may read in another way than this function.
    """
    try:
        # A compressed archive could hold far more than its size.
        with tarfile.open(path, "r:") as archive:
            members = _members(archive, path)
            content = _json(_bytes_of(archive, members, "manifest.json"), _KEYS)
            if not isinstance(content, list) or len(content) != 1 or content[0].get("RepoTags"):
                raise CopyError("it holds several images, or names for one", _HOSTILE)
            config = _digest(_bytes_of(archive, members, content[0]["Config"]))
            if "index.json" not in members:
                return [config]
            listed = _json(_bytes_of(archive, members, "index.json"), _OCI_KEYS)["manifests"]
            if len(listed) != 1 or set(listed[0].get("annotations") or {}) & _NAMES:
                raise CopyError("it holds several images, or names for one", _HOSTILE)
            found = _blob(archive, members, listed[0]["digest"])
            if found is None or not _is_of(archive, members, found, config):
                raise CopyError("its index.json names another image than its manifest.json", _HOSTILE)
            return [config, _digest(found)]
    except (tarfile.TarError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CopyError("it is no archive of one image: {!r:.200}".format(error), _HOSTILE) from error


def _is_of(archive, members, data, config):
    """Return True if a manifest names this configuration; for a list of manifests, if all do that are in the archive.

    A list may have attestations as well, for a platform that no engine runs.
    """
    values = _json(data, _OCI_KEYS)
    if "manifests" not in values:
        return values["config"]["digest"] == config
    found = []
    for each in values["manifests"]:
        platform = each.get("platform") or {}
        data = _blob(archive, members, each["digest"])
        if data is not None and (platform.get("os"), platform.get("architecture")) != ("unknown", "unknown"):
            found.append(_json(data, _OCI_KEYS)["config"]["digest"] == config)
    return bool(found) and all(found)


def _members(archive, path):
    """Return the members of an archive by name. Raise ValueError if engines could take a name for another one.

    Engines clean names, follow links in the folder that they unpack into, and take the last of two equal names.
    """
    found, parents = {}, set()
    for member in archive:
        name = member.name
        if name.startswith("/") or posixpath.normpath(name) != name or name.split("/")[0] == "..":
            raise ValueError("the name {!a:.100}".format(name))
        if name in found or len(found) >= _MOST_MEMBERS:
            raise ValueError("the name {!a:.100} twice, or too many".format(name))
        found[name] = member
        while "/" in name:
            name = name.rpartition("/")[0]
            parents.add(name)
    odd = sorted(name for name in parents if name in found and not found[name].isdir())
    if odd:
        raise ValueError("{!a:.100} is no folder".format(odd[0]))
    with open(path, "rb") as file:
        # What follows after a header that this module cannot read, an engine may read.
        file.seek(archive.offset)
        end = file.read(_MOST_END_BYTES + 1)
    if len(end) > _MOST_END_BYTES or end.strip(b"\0"):
        raise ValueError("bytes after its end")
    return found


def _bytes_of(archive, members, name):
    member = members[name]
    if not member.isreg():
        raise ValueError("{!a:.100} is no file".format(name))
    if member.size > _MANIFEST_BYTES:
        raise ValueError("{!a:.100} is too large".format(name))
    return archive.extractfile(member).read()


def _blob(archive, members, digest):
    """Return the bytes that a digest names, or None if they are not in the archive."""
    kind, _, name = digest.partition(":")
    if "blobs/{}/{}".format(kind, name) not in members:
        return None
    data = _bytes_of(archive, members, "blobs/{}/{}".format(kind, name))
    if _digest(data) != digest:
        raise ValueError("{!a:.100} has another hash than its name".format(digest))
    return data


def _digest(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _json(data, keys):
    """Return the value of a JSON text. Raise ValueError for keys that engines, which ignore case, take for one of `keys`."""
    known = {key.casefold(): key for key in keys}

    def checked(pairs):
        for key, _ in pairs:
            if known.get(key.casefold(), key) != key:
                raise ValueError("the key {!a:.100}".format(key))
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    return json.loads(data, object_pairs_hook=checked)

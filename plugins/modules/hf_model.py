#!/usr/bin/python
"""Put a model into the host's HF cache, from the hub, another host or a local folder; resume and verify it."""

from __future__ import annotations

DOCUMENTATION = """
module: hf_model
short_description: Put a model into the host's HF cache, with resumption and verification by size and hash
description:
  - Makes no network request once the cache holds all files that an earlier run recorded as complete.
  - With C(peer), copies the model from another host of the fleet. Without C(peer_key) it only returns C(wants_peer) if
    the model is missing, so that the other host can be asked to open its cache.
  - With C(source_path), copies the model from a folder on the host (or from a cache folder models--ORG--NAME).
options:
  host: {description: Name of the host in messages., type: str, required: true}
  home: {description: HF_HOME., type: path, required: true}
  model: {description: "Name on the hub, ORG/NAME.", type: str, required: true}
  revision: {description: "Branch, tag or commit.", type: str, default: main}
  patterns: {description: Patterns of the files to fetch., type: list, elements: str, required: true}
  image: {description: "Image whose C(hf) downloads from the hub. It reads the token from HOME/token.", type: str, default: "mixtral-run:local"}
  endpoint: {description: URL of the hub., type: str, default: https://huggingface.co}
  source_path: {description: Local folder to copy from instead of the hub., type: str, default: ""}
  proxy: {description: Proxy for the hub., type: str, default: ""}
  no_proxy: {description: "Comma-separated hosts that are reached without the proxy.", type: str, default: ""}
  peer: {description: Name of another host that has the model., type: str, default: ""}
  peer_address: {description: Address of the other host as seen from this host., type: str}
  peer_port: {description: Port of the other host's SSH server., type: int, default: 22}
  peer_user: {description: User that reads the model on the other host., type: str}
  peer_key: {description: Private key for the copy., type: str}
  peer_problem: {description: Reason why the other host did not open its cache., type: str, default: ""}
  peer_host_keys: {description: "SSH host keys of the other host.", type: list, elements: str, default: []}
  uid: {description: Owner of the files., type: int, required: true}
  gid: {description: Group of the files., type: int, required: true}
  verify: {description: Hash files again even if an earlier run verified them., type: bool, default: false}
"""

import contextlib
import fnmatch
import hashlib
import os
import re
import tempfile

from ..module_utils.mixtral_run_host.files import Record, explain, write_text
from ..module_utils.mixtral_run_host.model.hf_download import HubDownload
from ..module_utils.mixtral_run_host.model.hf_peer import Peer
from ..module_utils.mixtral_run_host.model.model_cache import ModelCache, ModelError, RemoteFile, digest_of
from ..module_utils.mixtral_run_host.start import run_module

SPARE_GIB = 5


def main():
    run_module(
        act,
        {
            "host": {"type": "str", "required": True},
            "home": {"type": "path", "required": True},
            "model": {"type": "str", "required": True},
            "revision": {"type": "str", "default": "main"},
            "patterns": {"type": "list", "elements": "str", "required": True},
            "image": {"type": "str", "default": "mixtral-run:local"},
            "endpoint": {"type": "str", "default": "https://huggingface.co"},
            "source_path": {"type": "str", "default": ""},
            "proxy": {"type": "str", "default": ""},
            "no_proxy": {"type": "str", "default": ""},
            "peer": {"type": "str", "default": ""},
            "peer_address": {"type": "str"},
            "peer_port": {"type": "int", "default": 22},
            "peer_user": {"type": "str"},
            "peer_key": {"type": "str", "no_log": True},
            "peer_problem": {"type": "str", "default": ""},
            "peer_host_keys": {"type": "list", "elements": "str", "default": [], "no_log": False},
            "uid": {"type": "int", "required": True},
            "gid": {"type": "int", "required": True},
            "verify": {"type": "bool", "default": False},
        },
    )


def act(module):
    params = module.params
    record = Record("hf_models", check_mode=module.check_mode)
    cache = ModelCache(params["home"], params["model"], params["uid"], params["gid"])
    name = "{}@{}".format(params["model"], params["revision"])
    try:
        known = _recorded(record, name, cache, params)
        if known is None:
            if params["peer_problem"]:
                raise ModelError(
                    "{}: {}".format(params["peer"], params["peer_problem"]),
                    "hf_cache_peer names a host whose bootstrap has fetched the model",
                )
            if params["peer"] and not params["peer_key"]:
                module.exit_json(changed=module.check_mode, wants_peer=True)
            source = _from_folder if params["source_path"] else _from_peer if params["peer"] else _from_hub
            known = source(module, cache, params)
            if known is None:  # check mode
                module.exit_json(changed=True, fetched=[])
            changed = known.pop("fetched")
            record.values[name] = known
            record.save()
            module.exit_json(changed=changed, commit=known["commit"], files=len(known["files"]))
    except ModelError as error:
        module.fail_json(
            msg=explain(
                "The model cannot be put into the cache.",
                where="{}: {}".format(params["host"], cache.folder),
                expected=name,
                found=error.what,
                next_step=error.remedy,
            )
        )
    module.exit_json(changed=False, commit=known["commit"], files=len(known["files"]))


def _recorded(record, name, cache, params):
    """Return the record of an earlier complete run if every file still exists, else None.

    With `verify`, hash every file and remove those with a wrong hash first.
    """
    known = record.values.get(name)
    if known is None or known["patterns"] != params["patterns"]:
        return None
    files = [RemoteFile(*each) for each in known["files"]]
    snapshot = os.path.join(cache.folder, "snapshots", known["commit"])
    if params["verify"]:
        for file in files:
            with contextlib.suppress(ModelError):  # it is removed, and so it is fetched again
                if cache.has(file):
                    cache.check(file)
    whole = all(cache.has(file) and os.path.exists(os.path.join(snapshot, file.path)) for file in files)
    return known if whole else None


def _from_hub(module, cache, params):
    names = ("image", "home", "model", "revision", "patterns", "endpoint", "proxy", "no_proxy", "uid", "gid")
    download = HubDownload(**{name: params[name] for name in names})
    reason = download.missing_image()
    if reason and module.check_mode:
        return None  # a bare host: outside check mode, the image would exist by now
    if reason:
        raise ModelError(
            "the image {}, which downloads the model, is not on the host: {}".format(params["image"], reason),
            "run the docker and image roles first, as bootstrap does; or name a local copy (hf_cache_model_path)",
        )
    _need_space(cache, download.missing_bytes() or 0)
    if module.check_mode:
        return None
    before = _blobs(cache)
    commit, files = download.fetch()
    fresh = [file for file in files if file.digest not in before]
    for file in fresh:
        cache.check(file)
    return {
        "commit": commit,
        "files": [list(file) for file in files],
        "patterns": params["patterns"],
        "fetched": bool(fresh),
    }


def _blobs(cache):
    folder = os.path.dirname(cache.blob("x"))
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


def _from_peer(module, cache, params):
    with tempfile.TemporaryDirectory(prefix="mixtral-run-") as folder:
        key, known_hosts = os.path.join(folder, "key"), os.path.join(folder, "known_hosts")
        write_text(key, params["peer_key"].strip() + "\n", mode=0o600)
        address, port = params["peer_address"], params["peer_port"]
        place = address if port == 22 else "[{}]:{}".format(address, port)
        write_text(known_hosts, "".join("{} {}\n".format(place, each) for each in params["peer_host_keys"]), mode=0o600)
        peer = Peer(address, port, params["peer_user"], params["model"], key, known_hosts)
        return _fetch(peer, module, cache, params)


def _fetch(source, module, cache, params):
    commit = source.commit(params["revision"])
    files = source.files(commit, params["patterns"])
    if not files:
        raise ModelError("no file of the model matches {}".format(params["patterns"]), "see hf_cache_model_patterns")
    missing = [file for file in files if not cache.has(file)]
    _need_space(cache, sum(file.size for file in missing))
    if module.check_mode:
        return None
    for file in missing:
        cache.fetch(source, commit, file)
    return _publish(cache, params, commit, files, missing)


def _from_folder(module, cache, params):
    source = params["source_path"]
    snapshots = os.path.join(source, "snapshots")
    if os.path.isdir(snapshots):  # a cache folder: take its newest snapshot
        source = max((os.path.join(snapshots, each) for each in os.listdir(snapshots)), key=os.path.getmtime)
    if not os.path.isfile(os.path.join(source, "config.json")):
        raise ModelError("no model in {}".format(source), "hf_cache_model_path names a folder with config.json in it")
    files, origins = [], {}
    for parent, folders, names in os.walk(source):
        # The quantized cache that finetune writes next to the model. Each host creates its own.
        folders[:] = [each for each in folders if not each.startswith(("quantised-", ".quantised-"))]
        for each in sorted(names):
            path = os.path.relpath(os.path.join(parent, each), source)
            if any(fnmatch.fnmatchcase(path, pattern) for pattern in params["patterns"]):
                origin = os.path.realpath(os.path.join(parent, each))
                claimed = os.path.basename(origin)
                digest = digest_of(origin, "0" * 64)
                # A blob of a cache is named by its hash.
                is_blob = re.match(r"(?:[0-9a-f]{40}|[0-9a-f]{64})$", claimed)
                if is_blob and claimed not in (digest, digest_of(origin, "0" * 40)):
                    raise ModelError(
                        "{} is damaged: its hash is {}, not {}".format(origin, digest, claimed), "copy it anew"
                    )
                files.append(RemoteFile(path, os.path.getsize(origin), digest))
                origins[path] = origin
    missing = [file for file in files if not cache.has(file)]
    _need_space(cache, sum(file.size for file in missing))
    if module.check_mode:
        return None
    for file in missing:
        cache.take(origins[file.path], file)
    listing = "".join("{} {}\n".format(file.digest, file.path) for file in sorted(files))
    return _publish(cache, params, hashlib.sha1(listing.encode()).hexdigest(), files, missing)


def _publish(cache, params, commit, files, missing):
    changed = cache.publish(params["revision"], commit, files)
    return {
        "commit": commit,
        "files": [list(file) for file in files],
        "patterns": params["patterns"],
        "fetched": bool(missing) or changed,
    }


def _need_space(cache, num_bytes):
    folder = cache.folder
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    figures = os.statvfs(folder)
    free = figures.f_bavail * figures.f_frsize / 2**30
    needed = num_bytes / 2**30
    if num_bytes and free < needed + SPARE_GIB:
        raise ModelError(
            "{:.1f} GiB free under {}; {:.1f} GiB are still to come".format(free, folder, needed),
            "put hf_cache_home on a larger disk",
        )


if __name__ == "__main__":
    main()

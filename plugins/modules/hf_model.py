#!/usr/bin/python
"""Put a model into the host's HF cache, from the hub, another host or a local folder; resume and verify it."""

from __future__ import annotations

DOCUMENTATION = """
module: hf_model
short_description: Put a model into the host's HF cache, with resumption and verification by size and hash
description:
  - Makes no network request once the cache holds all files that an earlier run recorded as complete.
  - With C(via) C(look), returns in C(spread) whether the host has the model and what it consists of, and takes back the
    keys that a killed run left. The action C(spread_plan) reads this answer of all hosts. C(visit) is C(look) on a host
    outside the play; it changes nothing there, and a model counts that something else has put into the cache.
  - With C(via) C(peer), copies the files of C(content) from another host of the fleet. Names and hashes come from the
    operator, who has them from the host that took the model from outside; the other host gives bytes only.
  - With C(via) C(origin), downloads the model from the hub; with C(source_path), copies it from a folder on the host (or
    from a cache folder models--ORG--NAME).
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
  via: {description: Source of the model., type: str, choices: [origin, look, visit, peer], default: origin}
  user: {description: "Login user. Empty means the user who became root.", type: str, default: ""}
  askers: {description: "Hosts of this play. With a look, keys for them that a killed run left are taken back.", type: list, elements: str, default: []}
  run_id: {description: "Name of this run of Ansible, which the action plugin adds. A look leaves the keys of this run.", type: str, default: ""}
  peer: {description: "Name of a host that the operator named, which is asked instead of the hub; or the host that is read.", type: str, default: ""}
  content: {description: "With C(peer), commit and files of the model: path, size and hash of each.", type: dict, default: {}}
  peer_address: {description: Address of the other host as seen from this host., type: str}
  peer_port: {description: Port of the other host's SSH server., type: int, default: 22}
  peer_user: {description: User that reads the model on the other host., type: str}
  peer_key: {description: Private key for the copy., type: str}
  peer_problem: {description: Reason why the other host did not open its cache., type: str, default: ""}
  peer_host_keys: {description: "SSH host keys of the other host.", type: list, elements: str, default: []}
  slowest_mib_per_second: {description: Rate below which the other host is given up. 0 is no limit., type: float, default: 0}
  uid: {description: Owner of the files., type: int, required: true}
  gid: {description: Group of the files., type: int, required: true}
  verify: {description: Hash files again even if an earlier run verified them., type: bool, default: false}
"""

import contextlib
import fnmatch
import hashlib
import os
import re
import time

from ..module_utils.mixtral_run_host.files import Record, explain
from ..module_utils.mixtral_run_host.model.hf_download import HubDownload
from ..module_utils.mixtral_run_host.model.model_cache import (
    ModelCache,
    checked_commit,
    checked_files,
)
from ..module_utils.mixtral_run_host.spread.blobs import CopyError, RemoteFile, copied, digest_of
from ..module_utils.mixtral_run_host.spread.keys import forget_copies
from ..module_utils.mixtral_run_host.spread.peer import connected
from ..module_utils.mixtral_run_host.spread.plan import ME, NOBODY
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
            "via": {"type": "str", "choices": ["origin", "look", "visit", "peer"], "default": "origin"},
            "user": {"type": "str", "default": ""},
            "askers": {"type": "list", "elements": "str", "default": []},
            "run_id": {"type": "str", "default": ""},
            "peer": {"type": "str", "default": ""},
            "content": {"type": "dict", "default": {}},
            "peer_address": {"type": "str"},
            "peer_port": {"type": "int", "default": 22},
            "peer_user": {"type": "str"},
            "peer_key": {"type": "str", "no_log": True},
            "peer_problem": {"type": "str", "default": ""},
            "peer_host_keys": {"type": "list", "elements": "str", "default": [], "no_log": False},
            "slowest_mib_per_second": {"type": "float", "default": 0},
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
        if params["via"] == "visit":
            known = known or cache.snapshot(params["revision"], params["patterns"])
            _end(module, known, changed=False)
        if params["via"] == "look":
            _look(module, cache, known)
        changed, seconds = False, 0.0
        if known is None:
            source = _from_peer if params["via"] == "peer" else _from_folder if params["source_path"] else _from_hub
            began = time.monotonic()
            known = source(module, cache, params)
            if known is None:  # check mode
                module.exit_json(changed=True, fetched=[])
            changed, seconds = known.pop("fetched"), time.monotonic() - began
            record.values[name] = known
            record.save()
            if params["via"] == "peer":
                note = copied(
                    "{}@{}".format(params["model"], params["revision"]), params["peer"], known["files"], seconds
                )
                _end(module, known, changed=changed, seconds=round(seconds, 1), spread_note=note)
        _end(module, known, changed=changed, seconds=round(seconds, 1))
    except CopyError as error:
        module.fail_json(
            msg=explain(
                "The model cannot be put into the cache.",
                where="{}: {}".format(params["host"], cache.folder),
                expected=name,
                found=error.what,
                next_step=error.remedy,
            ),
            found=error.what,
            blame=error.blame,
        )


def _look(module, cache, known):
    """Report what this host has, and what it may take from outside the fleet. Take back the keys of a killed run."""
    params = module.params
    changed = False
    if not module.check_mode:
        changed = forget_copies(params["user"], params["run_id"], params["askers"])
    elif known is None:
        if not params["peer"]:
            (_from_folder if params["source_path"] else _from_hub)(module, cache, params)
        changed = True
    _end(module, known, changed=changed)


def _end(module, known, **answer):
    """End the module with `spread`: what this host has, for the plan of the next round."""
    params = module.params
    content = {"commit": known["commit"], "files": known["files"]} if known else {}
    spread = {
        "identity": "{}@{} {}".format(params["model"], params["revision"], " ".join(params["patterns"])),
        "looked": time.time(),
        "holds": known is not None,
        "content": content,
    }
    if not known:
        answer["msg"] = "it does not have {}".format(params["model"])
    module.exit_json(spread=spread, commit=content.get("commit"), files=len(content.get("files", ())), **answer)


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
            with contextlib.suppress(CopyError):  # it is removed, and so it is fetched again
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
        raise CopyError(
            "the image {}, which downloads the model, is not on the host: {}".format(params["image"], reason),
            "run the docker and image roles first, as bootstrap does; or name a local copy (hf_cache_model_path)",
            NOBODY,
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
    if params["peer_problem"]:
        raise CopyError("{}: {}".format(params["peer"], params["peer_problem"]), "run again")
    # The operator passes on what a host reported, so the names are checked as those of the hub are.
    files = checked_files(params["content"].get("files"), params["peer"])
    commit = checked_commit(params["content"].get("commit"), params["peer"])
    missing = [file for file in files if not cache.has(file)]
    _need_space(cache, sum(file.size for file in missing))
    if module.check_mode:
        return None
    slowest = params["slowest_mib_per_second"] * 2**20
    address, port, user = params["peer_address"], params["peer_port"], params["peer_user"]
    with connected(address, port, user, params["peer_key"], params["peer_host_keys"], slowest) as peer:
        for file in missing:
            cache.fetch(peer, file)
    return _publish(cache, params, commit, files, missing)


def _from_folder(module, cache, params):
    source = params["source_path"]
    snapshots = os.path.join(source, "snapshots")
    if os.path.isdir(snapshots):  # a cache folder: take its newest snapshot
        source = max((os.path.join(snapshots, each) for each in os.listdir(snapshots)), key=os.path.getmtime)
    if not os.path.isfile(os.path.join(source, "config.json")):
        raise CopyError("no model in {}".format(source), "hf_cache_model_path names a folder with config.json in it")
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
                    raise CopyError(
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
        raise CopyError(
            "{:.1f} GiB free under {}; {:.1f} GiB are still to come".format(free, folder, needed),
            "put hf_cache_home on a larger disk",
            ME,
        )


if __name__ == "__main__":
    main()

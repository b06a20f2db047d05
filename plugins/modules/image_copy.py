#!/usr/bin/python
"""Take the image that jobs run in from another host of the fleet, verify it, and load it."""

from __future__ import annotations

DOCUMENTATION = """
module: image_copy
short_description: Take an image from another host over SSH, verify its bytes and its ID, and load it
description:
  - The other host gives bytes only. The ID comes from the operator, who has it from the host that took the image from
    outside. The archive is compared with it before anything is loaded.
  - The archive stays for further hosts until C(spread_source) removes it.
  - With C(probe), nothing is copied. The module fails where the copy would fail for its connection or for missing space,
    before the other host spends minutes on saving its image.
options:
  host: {description: Name of the host in messages., type: str, required: true}
  name: {description: Name of the image on the host., type: str, required: true}
  content: {description: "ID of the image, and inputs and source for its record.", type: dict, required: true}
  file: {description: "Archive on the other host: name, size and SHA-256.", type: list, default: []}
  probe: {description: Only try the connection and look for the space., type: bool, default: false}
  num_bytes: {description: "With C(probe), the space that the archive will take.", type: int, default: 0}
  peer: {description: Name of the other host., type: str, required: true}
  peer_address: {description: Address of the other host as seen from this host., type: str, default: ""}
  peer_port: {description: Port of the other host's SSH server., type: int, default: 22}
  peer_user: {description: User that reads the archive there., type: str, default: ""}
  peer_key: {description: Private key for the copy., type: str, default: ""}
  peer_host_keys: {description: SSH host keys of the other host., type: list, elements: str, default: []}
  peer_problem: {description: Reason why the other host gives nothing., type: str, default: ""}
  slowest_mib_per_second: {description: Rate below which the other host is given up. 0 is no limit., type: float, default: 0}
  timeout_seconds: {description: Time limit for loading., type: int, default: 5400}
"""

import os
import re
import time

from ..module_utils.mixtral_run_host.commands import last_lines, run
from ..module_utils.mixtral_run_host.engine.image_inputs import DIGEST
from ..module_utils.mixtral_run_host.files import Record, explain
from ..module_utils.mixtral_run_host.model.model_cache import checked_files
from ..module_utils.mixtral_run_host.spread.archive import ImageArchive, image_report, need_space
from ..module_utils.mixtral_run_host.spread.blobs import CopyError, copied
from ..module_utils.mixtral_run_host.spread.image_ids import ids_in
from ..module_utils.mixtral_run_host.spread.peer import connected
from ..module_utils.mixtral_run_host.spread.plan import NOBODY
from ..module_utils.mixtral_run_host.start import run_module

OPTIONS = {
    "host": {"type": "str", "required": True},
    "name": {"type": "str", "required": True},
    "content": {"type": "dict", "required": True},
    "file": {"type": "list", "default": []},
    "probe": {"type": "bool", "default": False},
    "num_bytes": {"type": "int", "default": 0},
    "peer": {"type": "str", "required": True},
    "peer_address": {"type": "str", "default": ""},
    "peer_port": {"type": "int", "default": 22},
    "peer_user": {"type": "str", "default": ""},
    "peer_key": {"type": "str", "default": "", "no_log": True},
    "peer_host_keys": {"type": "list", "elements": "str", "default": [], "no_log": False},
    "peer_problem": {"type": "str", "default": ""},
    "slowest_mib_per_second": {"type": "float", "default": 0},
    "timeout_seconds": {"type": "int", "default": 5400},
}


def main():
    run_module(act, OPTIONS)


def act(module):
    params, began = module.params, time.monotonic()
    if module.check_mode:
        module.exit_json(changed=True)
    content = params["content"]
    try:
        if params["peer_problem"]:
            raise CopyError(params["peer_problem"], "run again")
        if not DIGEST.match(str(content.get("id"))):
            raise CopyError("{!r:.100} is no ID of an image".format(content.get("id")), "run again")
        if params["probe"]:
            need_space(ImageArchive().folder, params["num_bytes"])
            with _peer(params) as peer:
                peer.probe()
            module.exit_json(changed=False)
        image = _load(module, _archive(params), content["id"])
    except CopyError as error:
        module.fail_json(
            msg=explain(
                "The image cannot be had from another host.",
                where="{}: image {}".format(params["host"], params["name"]),
                expected="{} from {}".format(content.get("id"), params["peer"]),
                found=error.what,
                next_step=error.remedy,
            ),
            found=error.what,
            blame=error.blame,
        )
    record = Record("images")
    entry = {"id": image, "inputs": content["inputs"], "source": content["source"]}
    fetched = record.values.get(params["name"], {}).get("fetched")
    record.values[params["name"]] = dict(entry, fetched=fetched) if fetched else entry
    record.save()
    report = image_report(content["source"], content["inputs"], content["id"])
    seconds = time.monotonic() - began
    module.exit_json(
        changed=True,
        spread_note=copied(params["name"], params["peer"], [params["file"]], seconds),
        image={"id": image, "name": params["name"]},
        spread=report,
        seconds=round(seconds, 1),
    )


def _archive(params):
    """Have the archive on this host and return its path. An interrupted copy continues, also from another host."""
    archive = ImageArchive()
    (file,) = checked_files([params["file"]], params["peer"])
    if not archive.blobs.has(file):
        os.makedirs(archive.folder, mode=0o755, exist_ok=True)
        need_space(archive.folder, file.size)
        with _peer(params) as peer:
            archive.blobs.fetch(peer, file)
    path = archive.blobs.blob(file.digest)
    try:
        found = ids_in(path)
        if params["content"]["id"] not in found:
            raise CopyError("its archive holds {}; nothing was loaded".format(" or ".join(found)), "look at that host")
    except CopyError:
        os.unlink(path)
        raise
    with archive.locked():
        archive.remember(params["content"]["id"], file.digest)
    return path


def _peer(params):
    slowest = params["slowest_mib_per_second"] * 2**20
    address, port, user = params["peer_address"], params["peer_port"], params["peer_user"]
    return connected(address, port, user, params["peer_key"], params["peer_host_keys"], slowest)


def _load(module, path, image):
    """Load an archive and give the image its name. Return the ID that this host's engine gives to it."""
    params = module.params
    answer = run(["docker", "load", "--quiet", "--input", path], timeout=params["timeout_seconds"])
    if answer.code:
        # The archive may be at fault, or this engine: the source is not given up, and another one is tried.
        raise CopyError("docker load: " + last_lines(answer, 3), "`docker system df` there, then run again", NOBODY)
    # An engine that stores images in containerd makes a manifest of its own for an archive of an engine before 25. Only
    # it knows the ID of this manifest. Which image is in the archive was verified before.
    loaded = re.findall(r"^Loaded image ID: (sha256:[0-9a-f]{64})$", answer.out, re.MULTILINE)
    for each in dict.fromkeys([image] + ids_in(path) + loaded):
        known = run(["docker", "image", "inspect", "--format", "{{.Id}}", each], timeout=30)
        if known.code == 0:
            tagged = run(["docker", "tag", each, params["name"]], timeout=30)
            if tagged.code:
                raise CopyError("docker tag: " + last_lines(tagged, 2), "run again", NOBODY)
            return known.out.strip()
    raise CopyError("docker load ended, and the image is not there", "run again", NOBODY)


if __name__ == "__main__":
    main()

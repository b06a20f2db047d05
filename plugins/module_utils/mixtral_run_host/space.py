"""Space that the kit needs on a host: what for, where, and the sum for each filesystem."""

from __future__ import annotations

import os
from collections import namedtuple

from . import probe
from .commands import run

Need = namedtuple("Need", "what path gib settings")
"""A need of `gib` GiB under a folder. settings: the variables that move it to another disk."""
DATA_ROOT, CONTAINERD_ROOT = "/var/lib/docker", "/var/lib/containerd"
CONTAINERD_IMAGES_SINCE = 29


def needs(folders, space, checkpoints, swap_gib, image):
    """Return the needs of a host.

    Args:
        folders: hf_cache, swap, tmp, and data_root and containerd_root, which are empty for the defaults.
        space: GiB for hf_cache, image and tmp. A name that is missing needs nothing.
        checkpoints: the folders of checkpoints, and the GiB under each.
        swap_gib: GiB that the swap file will grow by.
        image: result of image_place().
    """
    paths, checkpoint_gib = checkpoints
    found = [
        Need("checkpoints", path, checkpoint_gib, "hf_cache_checkpoint_folder, preflight_disk_paths") for path in paths
    ]
    found.append(Need("the HF cache", folders["hf_cache"], space.get("hf_cache", 0), "hf_cache_home"))
    if image is not None:
        root = folders[image] or {"data_root": DATA_ROOT, "containerd_root": CONTAINERD_ROOT}[image]
        settings = "docker_data_root and docker_containerd_root"
        found.append(Need("the image", root, space.get("image", 0), settings))
    found.append(Need("the swap file", os.path.dirname(folders["swap"]), swap_gib, "swap_path"))
    found.append(Need("temporary files", folders["tmp"], space.get("tmp", 0), ""))
    return [need for need in found if need.gib > 0]


def image_place(name, planned_version):
    """Return the folder that the image will be stored in, data_root or containerd_root; None if the host has the image.

    A running engine tells where it stores images. A new installation stores them in containerd's root from Docker 29 on.
    planned_version: the version of docker-ce that is pinned, such as 5:28.5.*, or an empty string.
    """
    engine = probe.engine()
    if engine["version"]:
        answer = run(["docker", "image", "inspect", "--format", "{{.Id}}", name], timeout=30)
        if answer.code == 0:
            return None
        return "containerd_root" if engine["containerd_images"] else "data_root"
    major = planned_version.rpartition(":")[2].split(".")[0]
    old = major.isdigit() and int(major) < CONTAINERD_IMAGES_SINCE
    return "data_root" if old else "containerd_root"


def swap_growth(path, planned_gib):
    """Return the GiB that a swap file of the planned size takes beyond the file that exists."""
    try:
        there = os.stat(path).st_size / 2**30
    except OSError:
        there = 0
    return max(0, planned_gib - there)


def by_filesystem(wanted, own_folders):
    """Return one entry per filesystem: the needs there, its free space, and what `own_folders` hold if that is short."""
    found = {}
    for need in wanted:
        device, mount, kind = probe.mount_of(need.path)
        place = found.setdefault(device, {"mount": mount, "filesystem": kind, "needs": []})
        place["needs"].append(need)
    for place in found.values():
        first = place["needs"][0].path
        place["free_gib"] = probe.disk(first)["free_gib"]
        place["held_gib"] = 0
        if place["free_gib"] < sum(need.gib for need in place["needs"]):
            place["held_gib"] = probe.held_gib(first, own_folders)
    return list(found.values())


def shortfalls(places):
    """Yield (expected, found, remedy) for each filesystem that is too small for the sum of its needs. Pure."""
    for place in places:
        total = sum(need.gib for need in place["needs"])
        if place["free_gib"] + place["held_gib"] >= total:
            continue
        parts = ", ".join("{:g} GiB for {} under {}".format(*_words(need)) for need in place["needs"])
        found = "{:g} GiB free".format(place["free_gib"])
        if place["held_gib"]:
            found += ", and {:g} GiB that checkpoints and HF cache hold there, counted as free".format(
                place["held_gib"]
            )
        moves = "; ".join(
            "{} by {}".format(need.what, need.settings) for need in _once(place["needs"]) if need.settings
        )
        yield (
            "{:g} GiB free on {} ({}): {}".format(round(total, 1), place["mount"], place["filesystem"], parts),
            found,
            "free some space" + (", or move a part to a larger disk: " + moves if moves else ""),
        )


def _words(need):
    return round(need.gib, 2), need.what, need.path


def _once(wanted):
    """Return the first need of each kind."""
    return list({need.what: need for need in reversed(wanted)}.values())[::-1]

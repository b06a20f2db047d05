"""Command line for throw-away hosts, such as `python -m mixtral_run.fleet.testhosts up gpu-01 gpu-02`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from mixtral_run.fleet.testhosts import disks, hosts, kit_image, repository
from mixtral_run.fleet.testhosts.engine import why_no_engine
from mixtral_run.fleet.testhosts.image import RELEASES
from mixtral_run.fleet.testhosts.shell import TargetError


def main(argv: list[str]) -> int:
    """Run one command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mixtral_run.fleet.testhosts", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, words in (("up", "start bare hosts"), ("reimage", "give hosts a new key and an empty disk")):
        each = verbs.add_parser(verb, help=words)
        each.add_argument("names", nargs="+")
        each.add_argument("--release", choices=RELEASES, default="bookworm")
        each.add_argument(
            "--standin", type=json.loads, help="JSON of the fields of StandIn; without it the host has no GPUs"
        )
        each.add_argument("--disk", choices=["empty", "images"], default="empty",
                          help="images: with the images below the kit's and the base image of builds")  # fmt: skip
    standin = verbs.add_parser("standin", help="change the simulated GPUs of a running host")
    standin.add_argument("names", nargs="+")
    standin.add_argument("--standin", type=json.loads, required=True)
    down = verbs.add_parser("down", help="remove hosts and their disks; with the last host, the package server")
    down.add_argument("names", nargs="*")
    down.add_argument("--all", action="store_true", help="remove all hosts of this installation")
    listing = verbs.add_parser("inventory", help="print an Ansible inventory of the running hosts as JSON")
    listing.add_argument("names", nargs="*")
    listing.add_argument(
        "--release", action="append", choices=RELEASES, help="release that the package repository holds"
    )
    verbs.add_parser("archive", help="build the image archive for the hosts if it is missing")
    verbs.add_parser("wheels", help="fill the small wheelhouse for the hosts")
    arguments = parser.parse_args(argv)
    try:
        reason = why_no_engine()
        if reason:
            raise TargetError(reason)
        _act(arguments)
    except TargetError as error:
        print(f"✗ {error}", file=sys.stderr)
        return 3
    return 0


def _act(words: argparse.Namespace) -> None:
    if words.verb == "down":
        for name in hosts.running() if words.all else words.names:
            hosts.remove(name)
        repository.stop_unless_used()
    elif words.verb == "wheels":
        print(kit_image.fill_wheelhouse(kit_image.LIGHT))
    elif words.verb == "archive":
        print(kit_image.image_archive())
    elif words.verb == "inventory":
        print(json.dumps(inventory(words.names or hosts.running(), tuple(words.release or ["bookworm"])), indent=2))
    else:
        for name in words.names:
            gpus = hosts.StandIn(**words.standin) if words.standin is not None else None
            if words.verb == "standin":
                hosts.set_standin(hosts.find(name), gpus)
                continue
            start = hosts.start if words.verb == "up" else hosts.reimage
            disk = disks.with_images(words.release) if words.disk == "images" else None
            print(json.dumps(dataclasses.asdict(start(name, words.release, gpus, disk)), default=str))


def inventory(names: list[str], releases: tuple[str, ...] = ("bookworm",)) -> dict[str, object]:
    """Return an Ansible inventory of running hosts. The mirror variables of the roles point at the test repository."""
    return {
        "mixtral_hosts": {
            "hosts": {name: hosts.find(name).inventory_entry() for name in names},
            "vars": variables(releases),
        }
    }


def variables(releases: tuple[str, ...] = ("bookworm",)) -> dict[str, object]:
    """Return the group variables of these hosts: the package mirror, and sizes that fit a container."""
    mirror = repository.serve(releases)
    checkpoints = "/srv/checkpoints"
    return {
        **mirror.variables(),
        "preflight_ram_gib": 1,
        "preflight_free_gib": 1,
        "preflight_space_gib": {"image": 0.5, "tmp": 0.1},
        "preflight_driver_supported": "550",
        "preflight_disk_paths": [checkpoints],
        "preflight_mirrors": [f"{mirror.url}/linux/debian/gpg"],
        # Unlike a host, a container may not raise its limits.
        "docker_default_ulimits": {"nofile": {"Name": "nofile", "Soft": 4096, "Hard": 4096}},
        "docker_users": ["ops"],
        # /proc/swaps lists the swap files of the whole machine: each host needs another file name.
        "swap_path": f"{hosts.DATA_FOLDER}/swapfile-{{{{ inventory_hostname }}}}",
        "swap_size_gib": 0.03125,
        # vm.swappiness belongs to the machine, not to the container: only the scenario of the swap role sets it.
        "swap_swappiness": -1,
        "hf_cache_checkpoint_folder": checkpoints,
        "image_base_image": kit_image.BASE,
        "image_apt_packages": [],
        "image_requirements": kit_image.pinned(),
        "image_wheelhouse": f"{hosts.SHOWN_CACHE}/{kit_image.LIGHT_WHEELHOUSE.name}",
        "image_wheelhouse_on_host": True,
        "acceptance_checkpoint_folder": checkpoints,
        "acceptance_ulimits": [],
        "acceptance_shared_memory": "1g",
        "acceptance_size_mib": 16,
        # The GPUs are simulated: no container sees one.
        "acceptance_floors": {"num_gpus": 0, "shared_memory_gib": 0.5},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Tests of the test hosts themselves: the cleanup after a killed run, and the disks that the hosts start from."""

from pathlib import Path

import pytest

from mixtral_run.fleet.testhosts import disks, hosts, kit_image
from mixtral_run.fleet.testhosts.shell import TargetError, call

NAME = "leftover"


@pytest.mark.timeout(900)  # the first time it builds the image
@pytest.mark.parametrize("again", ["start", "remove"])
def test_what_a_host_left_whose_engine_was_killed_is_cleared(docker_engine: None, again: str) -> None:
    """Clear a host whose swap is still on. Its disk could not be removed, and the next host would get its swap file."""
    file = f"{hosts.DATA_FOLDER}/swapfile-{NAME}"
    host = hosts.start(NAME)
    try:
        host.shell(f"fallocate -l 8M {file} && chmod 600 {file} && mkswap {file} && swapon {file}")
        call("docker", "kill", hosts.container_name(NAME))
        if again == "start":
            assert not hosts.start(NAME).shell(f"ls {file}", check=False)
            with pytest.raises(TargetError, match="already in use"):
                hosts.start(NAME)  # a running host is never taken over
    finally:
        hosts.remove(NAME)
    assert not hosts.left_of(NAME)
    assert NAME not in Path("/proc/swaps").read_text()


@pytest.mark.timeout(1800)  # the first time it builds the image below the kit's
def test_a_host_shares_nothing_that_an_engine_rewrites_with_the_disk_it_starts_from(docker_engine: None) -> None:
    """Share the layers by hard links, which is fast, but copy every file that an engine writes in place."""
    source = disks.with_images("bookworm")
    own = "find . -path './overlay2/*/diff' -prune -o -type f -links +1 -print"
    shared = "find overlay2/*/diff -type f -links +1 -print -quit"
    try:
        host = hosts.start(NAME, disk=source)
        in_folder = f"cd {hosts.DATA_FOLDER} && "
        assert set(host.shell(f"{in_folder}ls").split()) == {"image", "overlay2"}
        assert host.shell(in_folder + own) == ""
        assert host.shell(in_folder + shared)
        names = host.shell(f"cat {hosts.DATA_FOLDER}/image/overlay2/repositories.json")
        engine_image = call("docker", "image", "inspect", "--format", "{{.Id}}", kit_image.dependencies()).strip()
        assert kit_image.BASE in names
        assert engine_image in names  # the name changes with a comment of the Dockerfile; the disk is kept
        assert kit_image.ARCHIVE_NAME not in names
        assert not host.shell("command -v dockerd", check=False)
    finally:
        hosts.remove(NAME)
    assert call("docker", "volume", "ls", "--quiet", "--filter", f"name=^{source}$").strip() == source

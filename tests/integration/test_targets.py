"""The test hosts themselves: what a killed run leaves is no host's."""

from pathlib import Path

import pytest

from mixtral_run.fleet.testhosts import hosts
from mixtral_run.fleet.testhosts.shell import TargetError, call

NAME = "leftover"


@pytest.mark.timeout(900)  # the first time it builds the image
@pytest.mark.parametrize("again", ["start", "remove"])
def test_what_a_host_left_whose_engine_was_killed_is_cleared(docker_engine: None, again: str) -> None:
    """Its swap is on still, so that its disk could not be removed; a host of its name began with that swap file."""
    file = f"{hosts.DATA_FOLDER}/swapfile-{NAME}"
    host = hosts.start(NAME)
    try:
        host.shell(f"fallocate -l 8M {file} && chmod 600 {file} && mkswap {file} && swapon {file}")
        call("docker", "kill", hosts.container_name(NAME))
        if again == "start":
            assert not hosts.start(NAME).shell(f"ls {file}", check=False)
            with pytest.raises(TargetError, match="already in use"):
                hosts.start(NAME)  # a host that runs is nobody's to take away
    finally:
        hosts.remove(NAME)
    assert not hosts.left_of(NAME)
    assert NAME not in Path("/proc/swaps").read_text()

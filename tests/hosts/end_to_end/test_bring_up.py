"""Two bare hosts are set up by one command, and `up` makes an adapter on one of them."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from packaging.requirements import Requirement

from mixtral_run.fleet.testhosts.kit_image import LOCK, REQUIREMENTS
from tests.hosts.end_to_end.fleet import IMAGE, MODELS, NAMES, SETTINGS, Fleet, Operator, changed_hosts

pytestmark = pytest.mark.timeout(1800)


def test_check_tells_what_it_would_do_and_leaves_bare_hosts_as_they_are(operator: Operator, fleet: Fleet) -> None:
    said = operator.run("bootstrap", *map(fleet.target, NAMES), *SETTINGS, "--check", "--diff")
    assert "would change" in said
    assert "± " in said and "daemon.json" in said
    would_change = changed_hosts(said)
    for name, host in fleet.hosts.items():
        assert would_change[fleet.target(name).split("@")[1]] > 0
        assert host.shell("command -v docker; ls /var/lib/mixtral-run", check=False) == ""


def test_two_bare_hosts_are_set_up_by_one_command(fleet: Fleet, bootstrapped: dict[str, int]) -> None:
    assert set(bootstrapped) == {fleet.target(name).split("@")[1] for name in NAMES}
    assert min(bootstrapped.values()) > 0
    # An image that was loaded or pulled from a registry has no such label.
    label = '{{ with .Config.Labels }}{{ index . "org.mixtral-run.inputs" }}{{ end }}'
    labels = [host.run("docker", "image", "inspect", IMAGE, "--format", label).strip() for host in fleet.hosts.values()]
    assert [len(each) for each in labels] == [64, 0]


def test_the_image_has_all_locked_packages_and_no_others(fleet: Fleet, bootstrapped: dict[str, int]) -> None:
    """The bill of materials lists what is installed; the role's lock names what must be."""
    show = f"docker run --rm --network none --entrypoint cat {IMAGE} /opt/mixtral-run/sbom.cdx.json"
    components = json.loads(fleet.hosts[NAMES[0]].shell(show))["components"]
    found = {each["name"]: each["version"] for each in components if each.get("purl", "").startswith("pkg:pypi/")}
    torch, _ = found.pop("torch"), found.pop("pip")
    assert f"torch=={torch.partition('+')[0]}" in REQUIREMENTS.read_text().splitlines()
    lines = LOCK.read_text().replace("\\\n", "").splitlines()
    locked = [Requirement(line.partition(" --hash=")[0]) for line in lines if not line.startswith("#")]
    here = [each for each in locked if each.marker is None or each.marker.evaluate()]
    assert found == {each.name: str(each.specifier).removeprefix("==") for each in here}


def test_up_makes_an_adapter(operator: Operator, fleet: Fleet, brought_up: str) -> None:
    assert changed_hosts(brought_up) == {fleet.target(NAMES[0]).split("@")[1]: 0}
    for word in (f"Convert {MODELS}/tiny → base", "Finetune → adapter", "iteration 4/4", "Export → adapter-peft"):
        assert word in brought_up
    assert (operator.folder / "my adapter/adapter_config.json").is_file()
    assert "fleet" not in operator.run("jobs", "--running")


def test_up_again_does_nothing(operator: Operator, up: Callable[..., str], brought_up: str) -> None:
    again = up("--data-path", "my pairs.jsonl")
    assert "Convert: base exists" in again
    assert "Finetune: adapter is at iteration 4" in again
    assert "Export: adapter-peft exists" in again
    assert "iteration" not in again.replace("at iteration 4", "")
    (operator.folder / "other.jsonl").write_text('{"instruction": "Who?", "response": "Me."}\n')
    assert "trained on another file than other.jsonl" in up("--data-path", "other.jsonl", code=2)

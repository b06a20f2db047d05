"""The image of the test hosts in two parts: what is below the kit, and the kit's own layers."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from mixtral_run.fleet.testhosts import kit_image

DOCKERFILE = Path(__file__).parents[4] / "roles/image/files/Dockerfile"


def test_both_halves_are_the_whole_dockerfile() -> None:
    """Every step of the role's Dockerfile runs once, in one of the two halves, with the arguments of its last stage."""
    below, upper = (half.splitlines() for half in kit_image._halves_of_dockerfile())
    whole = DOCKERFILE.read_text().splitlines()
    first = next(number for number, line in enumerate(upper) if line.startswith("COPY mixtral_run/"))
    assert below + upper[first:] == whole
    assert not [line for line in below if line.startswith("COPY mixtral_run/")]
    assert upper[:2] == ["ARG DEPENDENCIES", "FROM ${DEPENDENCIES}"]
    used = [name for name in ("CONTAINER_UID", "CONTAINER_GID") if f"${{{name}}}" in "\n".join(upper[first:])]
    assert used and [line.split()[1].split("=")[0] for line in upper[2:first]] == used


def test_an_archive_without_its_lowest_layers_keeps_the_rest(tmp_path: Path) -> None:
    layers = [f"{number}/layer.tar" for number in range(3)]
    contents = {name: name.encode() * 1000 for name in layers} | {"config.json": b"{}"}
    contents["manifest.json"] = json.dumps([{"Config": "config.json", "Layers": layers}]).encode()
    whole = tmp_path / "whole.tar"
    with tarfile.open(whole, "w") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    kit_image._write_upper_layers(whole, tmp_path / "upper.tar", 2)
    with tarfile.open(tmp_path / "upper.tar") as archive:
        found = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    # The manifest still names all three: an engine that has the lowest two asks for no file of theirs.
    assert found == {name: content for name, content in contents.items() if name not in layers[:2]}

"""Space is asked for where it is used, and added up for each filesystem."""

from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host import space
from ansible.module_utils.mixtral_run_host.space import Need

from tests.unit.host.programs import Programs, programs  # noqa: F401 - a fixture

FOLDERS = {
    "hf_cache": "/hf",
    "swap": "/data/swapfile",
    "tmp": "/tmp",
    "data_root": "",
    "containerd_root": "/big/containerd",
}


def test_needs_and_where_they_are() -> None:
    found = space.needs(FOLDERS, {"image": 40, "hf_cache": 100}, (["/a", "/b"], 400), 32, "containerd_root")
    assert [(need.what, need.path, need.gib) for need in found] == [
        ("checkpoints", "/a", 400),
        ("checkpoints", "/b", 400),
        ("the HF cache", "/hf", 100),
        ("the image", "/big/containerd", 40),
        ("the swap file", "/data", 32),
    ]
    # The host has the image and its swap file, and temporary files need nothing.
    assert [need.what for need in space.needs(FOLDERS, {"image": 40}, (["/a"], 1), 0, None)] == ["checkpoints"]
    (need,) = space.needs(FOLDERS, {"image": 40}, ([], 1), 0, "data_root")
    assert need.path == "/var/lib/docker"


@pytest.mark.parametrize(
    ("info", "has_image", "planned", "place"),
    [
        (None, False, "", "containerd_root"),
        (None, False, "5:28.5.*", "data_root"),
        (None, False, "5:29.*", "containerd_root"),
        ('{"ServerVersion": "28.1"}', False, "5:29.*", "data_root"),
        (
            '{"ServerVersion": "29.1", "DriverStatus": [["t", "io.containerd.snapshotter.v1"]]}',
            False,
            "",
            "containerd_root",
        ),
        ('{"ServerVersion": "29.1"}', True, "", None),
    ],
)
def test_the_folder_of_the_image(
    programs: Programs,  # noqa: F811
    info: str | None,
    has_image: bool,
    planned: str,
    place: str | None,
) -> None:
    if info:
        programs.put("docker", f"if [ \"$1\" = info ]; then echo '{info}'; exit; fi", f"exit {0 if has_image else 1}")
    else:
        programs.put("docker", "exit 127")
    assert space.image_place("kit", planned) == place


def test_a_swap_file_that_exists_needs_its_growth_only(tmp_path: Path) -> None:
    with (tmp_path / "swap").open("wb") as file:
        file.truncate(2**30)
    assert space.swap_growth(str(tmp_path / "swap"), 3) == 2
    assert space.swap_growth(str(tmp_path / "swap"), 0.5) == 0
    assert space.swap_growth(str(tmp_path / "none"), 3) == 3


def test_what_is_on_one_filesystem_is_added_up(tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    (tmp_path / "held/weights").write_bytes(bytes(110 << 20))
    (tmp_path / "held").rename(tmp_path / "own")
    wanted = [
        Need("a", str(tmp_path), 1e6, "x"),
        Need("b", str(tmp_path / "not/yet"), 1, "y"),
        Need("c", "/proc", 1, "z"),
    ]
    first, second = space.by_filesystem(wanted, [str(tmp_path / "own")])
    assert [need.what for need in first["needs"]] == ["a", "b"] and [need.what for need in second["needs"]] == ["c"]
    assert first["free_gib"] > 0 and first["held_gib"] == 0.1
    assert second["mount"].startswith("/proc")
    assert space.by_filesystem([Need("b", str(tmp_path), 0.001, "y")], [str(tmp_path / "own")])[0]["held_gib"] == 0


PLACE = {
    "mount": "/", "filesystem": "ext4", "free_gib": 100.0, "held_gib": 0,
    "needs": [Need("checkpoints", "/a", 80, "one"), Need("checkpoints", "/b", 20, "one"),
              Need("the image", "/c", 40, "two"), Need("temporary files", "/tmp", 1, "")],
}  # fmt: skip


def test_a_shortfall_tells_each_part_and_how_to_move_it() -> None:
    ((expected, found, remedy),) = space.shortfalls([PLACE])
    assert expected == (
        "141 GiB free on / (ext4): 80 GiB for checkpoints under /a, 20 GiB for checkpoints under /b, "
        "40 GiB for the image under /c, 1 GiB for temporary files under /tmp"
    )
    assert found == "100 GiB free"
    assert remedy == "free some space, or move a part to a larger disk: checkpoints by one; the image by two"


def test_what_the_kit_holds_counts_as_free_and_is_told() -> None:
    assert list(space.shortfalls([{**PLACE, "held_gib": 41.0}])) == []
    ((_, found, _),) = space.shortfalls([{**PLACE, "held_gib": 40.0}])
    assert found == "100 GiB free, and 40 GiB that checkpoints and HF cache hold there, counted as free"

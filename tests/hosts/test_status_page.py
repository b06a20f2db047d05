"""Status page in a real browser: it sorts and filters offline, and escapes all text that comes from a host."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from mixtral_run.fleet.status.page import page, write_page
from mixtral_run.fleet.status.read_fleet import HostStatus, with_differences
from mixtral_run.fleet.testhosts.engine import install_packages
from tests.support.needs import missing


@pytest.fixture(scope="module")
def chromium() -> str:
    if not shutil.which("chromium") and os.geteuid() == 0 and Path("/usr/bin/apt-get").exists():
        install_packages("chromium")
    found = shutil.which("chromium")
    if found is None:
        missing("no chromium here, and only root can install it")
    return found


def browse(chromium: str, profile: Path, *flags: str) -> str:
    quiet = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
    )  # fmt: skip
    argv = [chromium, *quiet, f"--user-data-dir={profile}", *flags]
    return subprocess.run(argv, check=True, capture_output=True, timeout=120).stdout.decode()


def fleet() -> tuple[HostStatus, ...]:
    hosts = []
    for number in range(1, 13):
        hosts.append(
            HostStatus(
                name=f"gpu-{number:02}", reachable=True, os="Ubuntu 24.04.3 LTS", kernel="6.8.0-79-generic",
                driver="550.54.15" if number != 7 else "535.183.01", gpu_model="NVIDIA H100 80GB HBM3", num_gpus=8,
                gpu_memory_gib=79.6, hottest_celsius=30.0 + number * 4, fabric_manager="550.54.15", engine="28.5.1",
                toolkit="1.18.0", gpus_by="CDI", image="9f31c0de7a42", swap_gib=64.0, ram_gib=2015.4,
                disks=(("/checkpoints", 4200.5 - number * 333), ("/", 77.0)), models=("mistralai/Mixtral-8x7B-v0.1",),
                checkpoints=("/checkpoints/mixtral",), adapters=("/checkpoints/support (iteration 500)",),
                jobs=("finetune-1122-101500-ab12 (finetune, 2 hours ago)",) if number == 3 else (),
                acceptance="accepted, all reduce gb per second 412", set_up="2026-11-20T09:12:44Z",
                reimaged=number == 5, warnings=("GPU 4 at 88 °C",) if number == 9 else (),
            )
        )  # fmt: skip
    hosts.append(HostStatus("gpu-13", reachable=False, error="gpu-13 does not answer."))
    hosts.append(HostStatus("gpu-14", reachable=True, os='<script>document.title="owned"</script>', kernel="<b>k</b>"))
    return with_differences(hosts)


def test_the_page_sorts_and_filters_and_escapes(chromium: str, tmp_path: Path) -> None:
    clicks = """<script>
      document.querySelectorAll("th button")[5].click(); document.querySelectorAll("th button")[5].click();
      document.getElementById("filter").value = "gpu-1";
      document.getElementById("filter").dispatchEvent(new Event("input"));
    </script></body>"""
    file = tmp_path / "status.html"
    file.write_text(page(fleet()).replace("</body>", clicks), encoding="utf-8")
    dom = browse(chromium, tmp_path / "profile", "--dump-dom", f"file://{file}")
    rows = re.findall(r'<tr( hidden="")?><td class="name">([^<]+)</td>', dom)
    assert [name for hidden, name in rows if not hidden] == ["gpu-12", "gpu-11", "gpu-10", "gpu-14", "gpu-13"]
    assert [name for _, name in rows][:3] == ["gpu-12", "gpu-11", "gpu-10"]
    assert "<title>Fleet status</title>" in dom
    assert "&lt;script&gt;document.title" in dom


def test_problems_come_first() -> None:
    text = page(fleet())
    rows = re.findall(r'<td class="name">([^<]+)</td>', text)
    assert rows[:3] == ["gpu-13", "gpu-05", "gpu-09"], "unreachable, reimaged, with a warning"
    assert set(rows[3:5]) == {"gpu-07", "gpu-14"}, "then those that differ"
    assert rows[5:] == [f"gpu-{number:02}" for number in (1, 2, 3, 4, 6, 8, 10, 11, 12)]
    (listed,) = re.findall(r'<section class="problems">(.*?)</section>', text, re.DOTALL)
    assert re.findall(r"<b>([^<]+)</b>", listed) == ["gpu-13", "gpu-05", "gpu-09"]
    assert "gpu-13 does not answer." in listed and "GPU 4 at 88 °C" in listed
    fine = [status for status in fleet() if status.name in ("gpu-01", "gpu-02")]
    assert "Problems" not in page(fine)


def test_nothing_is_loaded_from_elsewhere() -> None:
    text = page(fleet())
    assert not re.search(r"""(src|href|url\()\s*=?\s*["']?(https?:)?//""", text)
    assert "@import" not in text


def test_a_host_that_differs_is_marked_where_it_differs() -> None:
    by_name = {status.name: status for status in fleet()}
    assert by_name["gpu-07"].differences == ("driver: 535.183.01 (most: 550.54.15)",)
    assert by_name["gpu-01"].differences == ()
    row = next(line for line in page(fleet()).splitlines() if ">gpu-07<" in line)
    assert re.search(r'<td class="odd">535\.183\.01</td>', row)
    assert row.count('class="odd"') == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_screenshot_has_the_schemes_background(chromium: str, tmp_path: Path, scheme: str) -> None:
    file, shot = tmp_path / "status.html", tmp_path / f"{scheme}.png"
    write_page(file, fleet())
    dark = (
        ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else ["--blink-settings=preferredColorScheme=1"]
    )
    browse(chromium, tmp_path / "profile", *dark, "--window-size=1500,900", f"--screenshot={shot}", f"file://{file}")
    red, green, blue = corner(shot)
    assert (red + green + blue) / 3 > 200 if scheme == "light" else (red + green + blue) / 3 < 60
    keep = os.environ.get("MIXTRAL_RUN_KEEP_SCREENSHOTS")
    if keep:
        shutil.copy(shot, Path(keep) / shot.name)


def corner(png: Path) -> tuple[int, int, int]:
    """Return the color of the first pixel, which every PNG filter leaves unchanged in the first row."""
    import zlib

    data, place, compressed = png.read_bytes(), 8, b""
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        if kind == b"IDAT":
            compressed += data[place + 8 : place + 8 + length]
        place += length + 12
    red, green, blue = zlib.decompress(compressed)[1:4]
    return red, green, blue

"""State of the fleet as one HTML file: works offline, light and dark, sortable."""

from __future__ import annotations

import html
import os
import string
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.errors import ConfigError
from mixtral_run.fleet.status.read_fleet import HostStatus, shown

STATUS_PAGE = Path(__file__).with_name("status.html")
"""Template of the page."""


@dataclass(frozen=True)
class Column:
    """A column of the page. `field_title` is the title under which `differences` name the field."""

    title: str
    cell: Callable[[HostStatus], str]
    """Returns the HTML of a cell, with the values of the host escaped."""
    field_title: str = ""
    sort: Callable[[HostStatus], str] | None = None


def _text(value: object) -> str:
    words = shown(value)
    return html.escape(words) if words != "none" else '<span class="none">–</span>'


def _list(values: Sequence[str], style: str = "") -> str:
    if not values:
        return '<span class="none">–</span>'
    if len(values) == 1:
        return f'<span class="{style}">{html.escape(values[0])}</span>'
    return f'<ul class="{style}">' + "".join(f"<li>{html.escape(value)}</li>" for value in values) + "</ul>"


def _severity(status: HostStatus) -> int:
    """Return the place of a host's state in STATES: the worst comes first."""
    found = (
        not status.reachable, bool(status.error), status.reimaged, bool(status.cordoned), bool(status.warnings),
        bool(status.differences),
    )  # fmt: skip
    return next((place for place, holds in enumerate(found) if holds), len(found))


STATES = (
    ("bad", "✗ unreachable"), ("bad", "! unreadable"), ("bad", "! reimaged"), ("bad", "! cordoned"),
    ("bad", "! warning"), ("warn", "! differs"), ("good", "✓ fine"),
)  # fmt: skip
"""Style and words of each state."""


def _state(status: HostStatus) -> str:
    style, words = STATES[_severity(status)]
    return f'<span class="{style}">{words}</span>'


def _gpus(status: HostStatus) -> str:
    return html.escape(f"{status.num_gpus} × {status.gpu_model}") if status.num_gpus else _text("")


def _remarks(status: HostStatus) -> str:
    return _list([*_problems(status), *status.differences], "warn")


def _problems(status: HostStatus) -> list[str]:
    """Return what is wrong with a host, apart from what differs from the rest of the fleet."""
    first = [status.error] if status.error else []
    reimaged = ["reimaged since it was set up: run bootstrap"] if status.reimaged else []
    return [*first, *reimaged, *status.warnings]


def _gib(value: float) -> str:
    return f"{value:g} GiB" if value else ""


def _gpu_errors(status: HostStatus) -> str:
    if not status.num_gpus:
        return ""
    return f"{status.ecc_errors} / {'?' if status.xid_errors is None else len(status.xid_errors)}"


COLUMNS = (
    Column("Host", lambda status: html.escape(status.name)),
    Column("State", _state, sort=lambda status: str(_severity(status))),
    Column("Remarks", _remarks, sort=lambda status: str(len(status.warnings) * 100 + len(status.differences))),
    Column("GPUs", _gpus, "GPU"),
    Column("GPU memory", lambda status: _text(_gib(status.gpu_memory_gib)), "GPU memory GiB"),
    Column("Hottest", lambda status: _text(f"{status.hottest_celsius:g} °C" if status.num_gpus else "")),
    Column("ECC / Xid", lambda status: _text(_gpu_errors(status))),
    Column("Driver", lambda status: _text(status.driver), "driver"),
    Column("Fabric manager", lambda status: _text(status.fabric_manager), "fabric manager"),
    Column("RDMA", lambda status: _text(status.rdma), "RDMA"),
    Column("Engine", lambda status: _text(status.engine), "engine"),
    Column(
        "Toolkit", lambda status: _text(f"{status.toolkit} ({status.gpus_by})" if status.toolkit else ""), "toolkit"
    ),
    Column("Image", lambda status: _text(status.image), "image"),
    Column("OS", lambda status: _text(status.os), "OS"),
    Column("Kernel", lambda status: _text(status.kernel), "kernel"),
    Column("RAM", lambda status: _text(_gib(status.ram_gib)), "RAM GiB"),
    Column("Swap", lambda status: _text(_gib(status.swap_gib)), "swap GiB"),
    Column("Free disk", lambda status: _list([f"{path}: {free:g} GiB" for path, free in status.disks])),
    Column("Models", lambda status: _list(status.models), "models"),
    Column("Checkpoints", lambda status: _list(status.checkpoints)),
    Column("Adapters", lambda status: _list(status.adapters)),
    Column("Jobs", lambda status: _list(status.jobs)),
    Column("Health", lambda status: _text(status.health)),
    Column("Acceptance", lambda status: _text(status.acceptance)),
    Column("Set up", lambda status: _text(status.set_up)),
)


def page(statuses: Sequence[HostStatus], when: float | None = None) -> str:
    """Return the HTML of the page, with the hosts that have problems first. It loads nothing from elsewhere."""
    ordered = sorted(statuses, key=_severity)
    template = string.Template(STATUS_PAGE.read_text(encoding="utf-8"))
    moment = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(when))
    return template.substitute(
        title="Fleet status",
        when=f"Read {moment} by mixtral-run status",
        tiles=_tiles(statuses),
        problems=_problem_list(ordered),
        head="".join(f'<th scope="col"><button type="button">{column.title}</button></th>' for column in COLUMNS),
        rows="\n".join(_row(status) for status in ordered),
    )


def write_page(path: Path, statuses: Sequence[HostStatus]) -> None:
    """Write the page; an older one is replaced atomically. Raises ConfigError if it cannot be written."""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.resolve().parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page(statuses))
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).rename(path)
    except OSError as error:
        raise ConfigError("The page cannot be written.", where=str(path), found=error.strerror) from error


def _tiles(statuses: Sequence[HostStatus]) -> str:
    fine = sum(1 for status in statuses if STATES[_severity(status)][0] == "good")
    unreachable = sum(1 for status in statuses if not status.reachable)
    numbers = (
        (len(statuses), "hosts", ""),
        (fine, "fine", "good"),
        (len(statuses) - fine - unreachable, "with remarks", "warn"),
        (unreachable, "unreachable", "bad"),
        (sum(status.num_gpus for status in statuses), "GPUs", ""),
        (sum(len(status.jobs) for status in statuses), "jobs", ""),
    )
    return "".join(
        f'<div class="tile"><b class="{style if number else ""}">{number}</b><span>{words}</span></div>'
        for number, words, style in numbers
    )


def _problem_list(ordered: Sequence[HostStatus]) -> str:
    """Return a list of the hosts that need somebody, which a phone shows without scrolling sideways."""
    found = [
        f"<li><b>{html.escape(status.name)}</b> {_state(status)}"
        + "".join(f"<p>{html.escape(each)}</p>" for each in _problems(status))
        + "</li>"
        for status in ordered
        if STATES[_severity(status)][0] == "bad"
    ]
    return f'<section class="problems"><h2>Problems</h2><ul>{"".join(found)}</ul></section>' if found else ""


def _row(status: HostStatus) -> str:
    cells = []
    for column in COLUMNS:
        odd = any(
            difference.startswith(column.field_title + ":") for difference in status.differences if column.field_title
        )
        style = {"Host": "name", "Remarks": "remarks"}.get(column.title, "odd" if odd else "")
        sort = f' data-sort="{html.escape(column.sort(status))}"' if column.sort else ""
        cells.append(f'<td class="{style}"{sort}>{column.cell(status)}</td>')
    return f"<tr>{''.join(cells)}</tr>"

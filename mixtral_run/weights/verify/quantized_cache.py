"""What `verify` says of experts that are kept in 8 or 4 bit beside a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixtral_run.report import Report
from mixtral_run.weights.manifest.describe import describe_base
from mixtral_run.weights.quantized_cache import layout


def verify_kept(load: Path, report: Report, *, proof: bool, fingerprint: str) -> tuple[dict[str, Any], list[str]]:
    """Tell of each folder whether runs use it; with `proof` read every byte of those.

    fingerprint: the base's whole one, as read where all of it was. Returns what goes into the JSON report by precision,
    and faults.
    """
    told: dict[str, Any] = {}
    problems: list[str] = []
    for precision, look in layout.beside(describe_base(load)).items():
        folder = layout.kept_folder(load, precision)
        told[precision] = {"path": str(folder), "used": look.kept is not None, "why_not": look.why or None}
        if look.kept is None:
            report.warn(
                f"{folder.name} is not used: {look.why}; the next run on this base makes it again, or remove it"
            )
            continue
        size = look.kept.files.num_bytes
        told[precision]["num_bytes"] = size
        if look.kept.fingerprint != fingerprint:
            problems.append(
                f"{folder.name}: made of a base with fingerprint {look.kept.fingerprint}, not {fingerprint}: remove it"
            )
        elif proof:
            with report.progress(size, "read") as progress:
                found = layout.check(look.kept, progress.advance)
            problems += [f"{folder.name}/{problem}: remove the folder, runs make it again" for problem in found]
            if not found:
                report.done(f"{folder.name}: every byte is what was written ({size / 1e6:,.0f} MB)")
        else:
            report.say(f"  experts in {precision} are kept in {folder.name}: {size / 1e6:,.0f} MB")
    return told, problems

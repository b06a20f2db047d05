"""Verify the caches of quantized experts that are stored next to a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixtral_run.terminal.report import Report
from mixtral_run.weights.manifest.describe import describe_base
from mixtral_run.weights.quantized_cache import layout


def verify_quantized_caches(
    load: Path, report: Report, *, proof: bool, fingerprint: str
) -> tuple[dict[str, Any], list[str]]:
    """Report for each cache whether runs use it; with `proof` read every byte of those that are used.

    fingerprint: the base's whole fingerprint. Returns the part of the JSON report, by precision, and the problems.
    """
    reported: dict[str, Any] = {}
    problems: list[str] = []
    for precision, lookup in layout.find_caches(describe_base(load)).items():
        folder = layout.cache_folder(load, precision)
        used = lookup.cache is not None
        reported[precision] = {"path": str(folder), "used": used, "why_not": lookup.why or None}
        if lookup.cache is None:
            report.warn(
                f"{folder.name} is not used: {lookup.why}; the next run on this base makes it again, or remove it"
            )
            continue
        size = lookup.cache.files.num_bytes
        reported[precision]["num_bytes"] = size
        if lookup.cache.fingerprint != fingerprint:
            problems.append(
                f"{folder.name}: made of a base with fingerprint {lookup.cache.fingerprint}, not {fingerprint}: "
                "remove it"
            )
        elif proof:
            with report.progress(size, "read") as progress:
                found = layout.check(lookup.cache, progress.advance)
            problems += [f"{folder.name}/{problem}: remove the folder, runs make it again" for problem in found]
            if not found:
                report.done(f"{folder.name}: every byte is what was written ({size / 1e6:,.0f} MB)")
        else:
            report.say(f"  {folder.name}: quantized experts in {precision}, {size / 1e6:,.0f} MB")
    return reported, problems

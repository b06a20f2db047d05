"""The part of a run's page about its routers: tokens by expert and layer, and how far they moved from the base."""

from __future__ import annotations

from typing import Any

from mixtral_run.results.read_run import RunData, mapping, number, numbers
from mixtral_run.results.svg import Series, escaped, heat_map, line_chart

_MOST_LAYERS, _MOST_EXPERTS = 256, 64


def router_section(data: RunData) -> str:
    """Return the section; an empty text if the run has no counts."""
    router = mapping(data.summary.get("router"))
    shares = shares_of(router.get("tokens"))
    if not shares:
        return ""
    total = sum(sum(row) for row in router["tokens"]) // len(shares)
    dropped, retaken = router.get("dropped_tokens"), router.get("retaken_steps")
    about = (
        f'Choices of experts in each layer: <span data-of="router.choices">{total:,}</span>. '
        f'Dropped: <span data-of="router.dropped_tokens">{escaped(dropped)}</span>. Steps that were taken again, as '
        f'tokens exceeded the capacity of a process: <span data-of="router.retaken_steps">{escaped(retaken)}</span>.'
    )
    cards = [f'<div class="card"><h3>Share of the tokens by layer and expert</h3>{heat_map(shares, "Router")}</div>']
    for of, title in (("validation", "the validation set"), ("training", "the training data")):
        lines = [line for line in data.router if line.get("of") == of]
        series = [
            Series(name, _drift(lines, name), style) for name, style in (("drift_mean", "a"), ("drift_largest", "b"))
        ]
        drawing = line_chart(series, f"Drift on {title}", may_be_log=False)
        if drawing:
            cards.append(
                f'<div class="card"><h3>Drift of the shares on {title}</h3><div class="legend"><span><i class="a"></i>'
                f'mean of the layers</span><span><i class="b"></i>largest of a layer</span></div>{drawing}</div>'
            )
    note = (
        "Drift: the part of a layer's tokens that went to other experts than under the base, 0 to 1. On the validation "
        "set the same tokens are compared; on the training data the first iterations are the reference, and differ by "
        "their samples as well."
    )
    return f'<h2>Router</h2><p class="quiet">{about} {note}</p><div class="charts">{"".join(cards)}</div>'


def shares_of(counts: Any) -> list[list[float]]:
    """Return the share of each expert in each layer's tokens; nothing if the counts have another form."""
    if not isinstance(counts, list) or not 0 < len(counts) <= _MOST_LAYERS:
        return []
    found = []
    for row in counts:
        if not isinstance(row, list) or not 0 < len(row) <= _MOST_EXPERTS:
            return []
        values = [number(each) for each in row]
        known = [each for each in values if each is not None and each >= 0]
        if len(known) != len(values) or not sum(known):
            return []
        found.append([each / sum(known) for each in known])
    return found


def _drift(lines: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    found = []
    for line in lines:
        layers = numbers(line.get("drift"))
        if layers:
            value = max(layers) if name == "drift_largest" else sum(layers) / len(layers)
            found.append((float(line["iteration"]), value))
    return found

"""Plot of a run's loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def loss_plot(losses: Sequence[float], path: Path, *, title: str) -> None:
    """Write the loss of each iteration as a PNG, on a logarithmic scale, as it may fall to a thousandth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    iterations = range(1, len(losses) + 1)
    axes.plot(iterations, losses, color="#1f6feb", linewidth=2)
    axes.set_yscale("log")
    axes.set_xlim(1, max(len(losses), 2))
    axes.set_xlabel("iteration")
    axes.set_ylabel("lm loss")
    axes.set_title(title, loc="left")
    axes.grid(True, which="both", color="#d0d7de", linewidth=0.6)
    axes.annotate(f"{losses[0]:.3g}", (1, losses[0]), xytext=(6, 2), textcoords="offset points")
    axes.annotate(
        f"{losses[-1]:.3g}", (len(losses), losses[-1]), xytext=(0, 12), textcoords="offset points", ha="right"
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, format="png")
    pyplot.close(figure)
    partial.rename(path)

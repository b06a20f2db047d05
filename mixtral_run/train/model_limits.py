"""What of the base model the user has to know before a job starts: longest sequences, and what is not used."""

from __future__ import annotations

from mixtral_run.launch import processes
from mixtral_run.terminal.report import Report
from mixtral_run.weights.manifest.describe import BaseDescription


def report_notes(base: BaseDescription, report: Report) -> None:
    """Report what of an HF model is not used, or used in another form, once for a job."""
    for note in base.notes if processes.rank() == 0 else ():
        report.warn(note)


def length_problems(flag: str, length: int, base: BaseDescription) -> list[str]:
    """Return the reason why the attention to `length` tokens would not be the model's, if it has a sliding window.

    The kit attends to all earlier tokens. Up to the size of the window that is the same.
    """
    window = base.architecture.sliding_window
    if window is None or length <= window:
        return []
    again = "" if base.weights is not None else ", and convert it again"
    return [
        f"{flag} {length}: expected at most {window}, the sliding_window of the model's config.json: the kit attends "
        "to all earlier tokens. If the model was trained without a window, as Mistral AI's were, set sliding_window in "
        f"config.json to null{again}"
    ]


def recompute_problems(layers: int | None, base: BaseDescription) -> list[str]:
    """Return the reason why --recompute-layers cannot be meant for this model. layers: None for all of them."""
    most = base.architecture.num_layers
    if layers is None or layers <= most:
        return []
    return [f"--recompute-layers {layers}: expected at most {most}, the layers of the model"]

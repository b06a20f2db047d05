"""Files that ship with the kit."""

from __future__ import annotations

from pathlib import Path

INSTRUCTIONS = Path(__file__).parent / "instructions.jsonl"
"""About 200 instruction/response pairs in the form that `--data-path` takes; the shortest answers come first."""

STATUS_PAGE = Path(__file__).with_name("status.html")
"""Template of the page that `status --html` writes."""

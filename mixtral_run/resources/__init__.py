"""Data files of the kit."""

from __future__ import annotations

from pathlib import Path

INSTRUCTIONS = Path(__file__).parent / "instructions.jsonl"
"""About 200 instruction/response examples in the format of `--data-path`, the shortest responses first."""

STATUS_PAGE = Path(__file__).with_name("status.html")
"""Template of the page that `status --html` writes."""

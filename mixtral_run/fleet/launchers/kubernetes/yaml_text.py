"""YAML that PyYAML, kubectl and people read as the same values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

# kubectl's reader takes 1e3, 0o17 and y for other things than text, where PyYAML's rules see none. Text that begins
# like a number or a sign, and the words for truth and nothing, are always quoted.
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")
_ODD_BREAKS = re.compile("[\x85\u2028\u2029\ufeff]")
"""Characters that some readers take for the end of a line, or leave out, unless they are escaped."""
_WORDS = frozenset(("y", "n", "yes", "no", "true", "false", "on", "off", "null"))


class _Dumper(yaml.SafeDumper):
    """Writer of YAML that repeats a value in place of a reference to it."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        return True


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # The lines of a text stay lines, for people who read the config of a job in its manifest.
    is_plain = _PLAIN.fullmatch(text) is not None and text.lower() not in _WORDS
    style = "|" if "\n" in text and not _ODD_BREAKS.search(text) else None if is_plain else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text_node)


def to_yaml(objects: Sequence[Mapping[str, Any]]) -> str:
    """Return the objects as the documents of one YAML text."""
    return "---\n".join(
        yaml.dump(each, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120) for each in objects
    )

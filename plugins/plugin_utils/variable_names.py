"""Names of variables that no role of the kit takes: which of them are misspellings, and which nothing uses at all.

Standard library only, because `mixtral-run` loads this file too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

OWN = "mixtral_own_variables"
"""List of names that belong to other roles of the operator, and that the check leaves alone."""
OF_THE_PLAYBOOKS = frozenset(
    (
        OWN,
        "mixtral_failed_task",
        "mixtral_failure",
        "mixtral_hosts_pattern",
        "mixtral_locked_hosts",
        "mixtral_reach",
        "mixtral_run",
        "mixtral_strategy",
        "mixtral_visit",
    )
)
"""Variables that the playbooks and modules of the kit read or set, apart from those of the roles."""
OF_KNOWN_ROLES = frozenset(("docker_package", "nvidia_driver_persistence_mode_on"))
"""Variables of geerlingguy.docker and nvidia.nvidia_driver that are like settings of the kit: a warning names them."""
NEAR_REST, NEAR_WHOLE = 0.8, 0.92
"""Least similarity of a misspelling: after the prefix of its role, and of a whole name without such a prefix."""
LIKE = 0.7
"""Least similarity of a setting that a warning names."""
_NAME = re.compile(r"[A-Za-z_]\w*")


class UnusedName(NamedTuple):
    """A variable that no role takes and no other variable mentions."""

    name: str
    like: str = ""
    """The most similar setting, or an empty text."""
    is_misspelled: bool = False


def unused_names(
    names: Iterable[str], extra: Collection[str], known: Collection[str], roles: Collection[str], texts: Iterable[str]
) -> list[UnusedName]:
    """Return the variables that nothing uses, in order.

    Args:
        names: of all variables of a host. Names without the prefix of a role count only if they are misspelled.
        extra: those of `names` that were given for this run (`-e`), which count with any name.
        known: the settings of all roles.
        texts: values of all variables. A name in one of their templates is used.
    """
    mentioned = {word for text in texts if "{{" in text or "{%" in text for word in _NAME.findall(text)}
    known = {*known, *OF_THE_PLAYBOOKS, *(word for word in mentioned if word.startswith("mixtral_"))}
    found = []
    for name in sorted({*names} - known - mentioned):
        if name.startswith(("ansible_", "_")) or name == "vars":
            continue
        prefix = _prefix(name, roles)
        like, is_near = _nearest(name, prefix, known)
        if is_near or prefix or name in extra:
            found.append(UnusedName(name, like, is_near and name not in OF_KNOWN_ROLES))
    return found


def _prefix(name: str, roles: Iterable[str]) -> str:
    return max((f"{role}_" for role in (*roles, "mixtral") if name.startswith(f"{role}_")), key=len, default="")


def _nearest(name: str, prefix: str, known: Collection[str]) -> tuple[str, bool]:
    """Return the most similar known name, and whether `name` is a misspelling of it.

    Names of one role are compared without its prefix, which would make all of them alike.
    """
    # Ansible takes `docker-users` from an inventory, but no template can name it.
    spelled = re.sub(r"\W", "_", name.lower())
    if spelled != name and spelled in known:
        return spelled, True
    rest = name.removeprefix(prefix)
    others = [each.removeprefix(prefix) for each in sorted(known) if each.startswith(prefix)]
    close = difflib.get_close_matches(rest, others, n=1, cutoff=LIKE if prefix else NEAR_WHOLE)
    # Two letters that changed places make a short word very different by this measure.
    turned = [each for each in others if sorted(each) == sorted(rest) and len(rest) > 2]
    if turned or not close:
        return (prefix + turned[0], True) if turned else ("", False)
    similarity = difflib.SequenceMatcher(None, rest, close[0]).ratio()
    return prefix + close[0], similarity >= (NEAR_REST if prefix else NEAR_WHOLE)


def misspelled(unused: UnusedName, where: str = "") -> str:
    """Return the line that refuses a misspelling. where: what the variable comes from, if that is known."""
    return f"{_placed(unused, where)}: no role takes it; did you mean {unused.like}?"


def warning(unused: Iterable[tuple[UnusedName, str]]) -> str:
    """Return the warning about names that may be somebody's own. Each comes with what it comes from, if known."""
    words = [f"{_placed(each, where)}{f', which is like {each.like}' if each.like else ''}" for each, where in unused]
    names = "; ".join(words)
    return f"No role takes these variables, and nothing else of the kit uses them: {names}. {OWN} lists your own."


def _placed(unused: UnusedName, where: str) -> str:
    return f"{unused.name} ({where})" if where else unused.name

"""Choice of hosts by names and Ansible host patterns: wildcards, groups, `!` (not), `&` (and), `[0]`, `~` (regex)."""

from __future__ import annotations

import fnmatch
import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence

from mixtral_run.errors import ConfigError
from mixtral_run.fleet.hosts import Host, known_as, names_of, parse_host, parse_hosts, shortened

Groups = Mapping[str, Sequence[str]]
"""Names of the hosts of each group of an inventory, those of its child groups included."""

# A colon before digits alone is that of a port. One in brackets belongs to an IPv6 address, or to a range.
_PART = re.compile(r"(?:\[[^\]]*\]|\(\?:|:(?=\d+(?::|$))|[^:])+")
_SUBSCRIPT = re.compile(r"(.+)\[(?:(-?\d+)|(\d+):(\d*))\]")
_FORMER_RANGE = re.compile(r"(.+)\[\d+-\d+\]")
_PATTERN_SIGNS = ("*", "?", "[", "!", "&", "~")


def split_patterns(text: str) -> list[str]:
    """Split `a,b`, `a b` and `a:!b` into single patterns. `gpu-02:2222` and an IPv6 address remain whole.

    A regular expression ends at a colon as well, but for that of `(?:`.
    """
    found: list[str] = []
    for piece in filter(None, re.split(r"[,\s]+", text)):
        found += [piece] if _is_whole(piece) else _PART.findall(piece)
    return found


def _is_whole(piece: str) -> bool:
    address = piece.rpartition("@")[2].lstrip("!&").partition("%")[0]
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        return False
    return True


def choose_hosts(words: Iterable[str], known: Sequence[Host], groups: Groups, *, others: bool) -> tuple[Host, ...]:
    """Return the hosts that names and patterns select, as Ansible does: first all that are named, then `&`, then `!`.

    Args:
        known: Hosts to choose from.
        others: Take a name that is none of theirs for the address of another host.

    Raises:
        ConfigError: A word or a pattern selects nothing, or a name is not valid.
    """
    pieces = [piece for word in words for piece in split_patterns(word)]
    # `gpu-01:x` is a mistyped port, unless both are known.
    whole = {piece for word in words for piece in re.split(r"[,\s]+", word)}
    plain = [piece for piece in pieces if not piece.startswith(("!", "&"))]
    unknown: list[str] = []
    strangers: list[str] = []

    def matching(pattern: str, *, may_be_new: bool = False) -> list[Host]:
        found = match(pattern, known, groups)
        if not found and may_be_new and others and pattern in whole and not _is_pattern(pattern):
            strangers.append(pattern)
        elif not found and not _names_empty_group(pattern, known, groups):
            unknown.append(pattern)
        return found

    selected = {piece: matching(piece, may_be_new=True) for piece in plain}
    if strangers:
        parse_hosts(strangers)  # reports all problems at once
    chosen = [host for piece in plain for host in selected[piece] or _new(piece, strangers)] if plain else list(known)
    for sign in ("&", "!"):
        for piece in pieces:
            if piece.startswith(sign):
                meant = matching(piece[1:])
                chosen = [host for host in chosen if (host in meant) == (sign == "&")]
    if unknown or not chosen:
        there = f"some of {names_of(known)}" + (f"; groups: {shortened(sorted(groups))}" if groups else "")
        raise ConfigError(
            "The pattern selects no host." if not unknown else "A name or pattern matches no host.",
            where=" ".join(words),
            expected=there,
            found=", ".join(dict.fromkeys(unknown)) or "none",
        )
    return tuple(dict.fromkeys(chosen))


def _names_empty_group(pattern: str, known: Sequence[Host], groups: Groups) -> bool:
    """Return True if a pattern is the name of a group that has no host, or none of those to choose from."""
    subscript = _SUBSCRIPT.fullmatch(pattern)
    name = subscript[1] if subscript else pattern
    return name in groups and not _matches(name, known, groups)


def _new(piece: str, strangers: Sequence[str]) -> list[Host]:
    return [parse_host(piece)] if piece in strangers else []


def _is_pattern(text: str) -> bool:
    """Return True if a text cannot be the name of a host. `[::1]:22` can."""
    return any(sign in text for sign in _PATTERN_SIGNS) and not re.fullmatch(
        r"(?:[^@]+@)?\[[0-9A-Fa-f:.]+\](:\d+)?", text
    )


def match(pattern: str, known: Sequence[Host], groups: Groups) -> list[Host]:
    """Return the hosts that one pattern without `!` and `&` matches; [] if there are none.

    A host is meant by its name, its address, or both with user and port. A name goes before that of a group, and an
    address that several hosts have is an error.
    """
    if not pattern:
        return []
    named = known_as(pattern, known)
    if named is not None:
        return [named]
    subscript = None if pattern.startswith("~") else _SUBSCRIPT.fullmatch(pattern)
    if not subscript:
        _refuse_former_range(pattern, known, groups)
        return _matches(pattern, known, groups)
    expression, index, first, last = subscript.groups()
    found = _matches(expression, known, groups)
    if index is not None:
        return found[int(index) :][:1] if -len(found) <= int(index) < len(found) else []
    return found[int(first) : int(last) + 1 if last else len(found)]


def _refuse_former_range(pattern: str, known: Sequence[Host], groups: Groups) -> None:
    """Raise ConfigError for `web*[1-2]`, which is a range for Ansible, and characters of a name for a wildcard."""
    former = None if pattern.startswith("~") else _FORMER_RANGE.fullmatch(pattern)
    if former and _matches(former[1], known, groups):
        raise ConfigError(
            "A host pattern has two meanings.",
            expected="[x:y] for a range of hosts; a name or ~ and a regular expression for characters of names",
            found=pattern,
        )


def _matches(expression: str, known: Sequence[Host], groups: Groups) -> list[Host]:
    if expression in ("all", "*"):
        return list(known)
    if expression.startswith("~"):
        try:
            fits = re.compile(expression[1:]).match
        except re.error as error:
            raise ConfigError("A host pattern is not a regular expression.", found=f"{expression}: {error}") from error
    else:
        fits = re.compile(fnmatch.translate(expression)).match
    by_name = {host.name: host for host in known}
    named = [group for group in groups if fits(group)]
    found = [by_name[name] for group in named for name in groups[group] if name in by_name]
    if not named or expression.startswith("~") or any(sign in expression for sign in ".?*["):
        found += [host for host in known if any(map(fits, (host.name, host.address, host.target)))]
    return list(dict.fromkeys(found))

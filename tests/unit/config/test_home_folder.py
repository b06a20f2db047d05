"""Paths that begin with ~."""

from pathlib import Path

import pytest

from mixtral_run.config.home_folder import expanded


def test_an_unknown_users_path_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/a/~b") == Path("/home/me/a/~b")
    assert expanded(Path("~no-such-user/key")) == Path("~no-such-user/key")
    assert expanded("~[[[") == Path("~[[[")
    assert expanded("/x/~") == Path("/x/~")

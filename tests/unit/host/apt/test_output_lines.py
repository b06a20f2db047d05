"""Lines of apt and dpkg, one by one: which repository fails and why, what would be done, and what helps."""

from __future__ import annotations

import pytest
from ansible.module_utils.mixtral_run_host.apt import apt_output
from ansible.module_utils.mixtral_run_host.apt.apt_output import Problem


def test_of_each_repository_the_longest_line_is_the_reason() -> None:
    text = """Hit:1 http://good/ubuntu jammy InRelease
Err:3 http://bad/ubuntu jammy InRelease
W: Failed to fetch http://bad/ubuntu/dists/jammy/InRelease  Could not connect to bad:80
E: The repository 'http://other/deb ./ Release' does not have a Release file.
E: Something without a repository
I: http://info/x is fine
"""
    assert apt_output.problems(text) == [
        Problem(
            "http://bad/ubuntu", "Failed to fetch http://bad/ubuntu/dists/jammy/InRelease  Could not connect to bad:80"
        ),
        Problem("http://other/deb", "The repository 'http://other/deb ./ Release' does not have a Release file."),
    ]


@pytest.mark.parametrize(
    ("uri", "repository"),
    [
        ("http://a/b/dists/stable/InRelease", "http://a/b"),
        ("http://a/b/InRelease", "http://a/b"),
        ("http://a/b/./Release.gpg", "http://a/b"),
        ("http://a/b/Packages.gz", "http://a/b"),
        ("http://a/b/./Packages", "http://a/b"),
        ("http://a/b/:,.", "http://a/b"),
        ("http://a/releases", "http://a/releases"),
    ],
)
def test_the_repository_of_a_file(uri: str, repository: str) -> None:
    assert apt_output._repository(uri) == repository


def test_where_apt_stops_to_read() -> None:
    text = "W: odd\nE: Conflicting values set for option Signed-By regarding source https://a/b/ jammy: x != y\nE: more"
    message = "Conflicting values set for option Signed-By regarding source https://a/b/ jammy: x != y"
    assert apt_output.unreadable(text) == ("https://a/b/", "", message)
    text = "E: Malformed entry 1 in list file /etc/apt/sources.list.d/x.list (URI)"
    assert apt_output.unreadable(text) == ("", "/etc/apt/sources.list.d/x.list", text[3:])
    assert apt_output.unreadable("W: /etc/apt/sources.list is odd") is None


@pytest.mark.parametrize(
    ("uri", "repository", "belongs"),
    [
        ("http://a/b", "https://a/b/", True),
        ("http://a/b/c", "http://a/b", True),
        ("http://a/bc", "http://a/b", False),
        ("http://a", "http://a/b", False),
        ("http://a", "", False),
    ],
)
def test_a_file_of_a_repository(uri: str, repository: str, belongs: bool) -> None:
    assert apt_output.belongs_to(uri, repository) is belongs


def test_what_would_be_done() -> None:
    text = """Remv old:amd64 [1]
Purg older [2]
Inst bash [5.1] (5.2 Debian:12 [amd64])
Inst lib:amd64 [1] (2 x [amd64]) []
Inst new (1.0 x [amd64])
Inst newer:arm64 (3 x [arm64])
Conf bash (5.2 x)
"""
    found = apt_output.simulated(text)
    assert found.removed == ["old", "older"] and found.new == ["new", "newer"]
    assert found.changed == {"bash": "5.2", "lib": "2"}


def test_files_that_name_a_repository() -> None:
    texts = {
        "one": "deb http://a/b jammy main",
        "two": "# deb http://a/b jammy main\n deb https://c/d x",
        "three": "URIs: https://a/b/\n",
        "four": "deb http://a/b/$(ARCH)/ ./",
        "five": "deb http://a jammy main",
    }
    assert apt_output.files_naming("http://a/b", texts) == ["one", "three", "five"]
    assert apt_output.files_naming("http://a/b/amd64", texts) == ["one", "three", "four", "five"]
    assert apt_output.files_naming("https://c/d/", texts) == ["two"]


def test_packages_that_dpkg_cannot_configure() -> None:
    text = """dpkg: error processing package b:amd64 (--configure):
 dpkg: error processing package no (x)
dpkg: error processing archive /var/cache/a.deb (--unpack):
dpkg: error processing package b (x)
"""
    assert apt_output.broken_packages(text) == ["/var/cache/a.deb", "b"]


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("E: Could not get lock /var/lib/dpkg/lock", "another package manager runs: wait"),
        ("is locked by another process", "another package manager runs: wait"),
        ("Version '1' for 'x' was not found", "pin a version that the repository offers:\n1.2\n1.3"),
        ("NO_PUBKEY ABC", "the repository is signed with another key"),
        ("dpkg was interrupted", "`sudo dpkg --configure -a`"),
        ("Read-only file system", "mount the file system writable"),
        ("odd", "run it by hand on the host to see more"),
    ],
)
def test_what_helps(text: str, step: str) -> None:
    assert apt_output.next_step(text, "1.2\n1.3").startswith(step)

"""What apt prints about sources and transactions, as apt 2.6 of Debian 12 printed it on a test host."""

import pytest
from ansible.module_utils.mixtral_run_host.apt import apt_output

GONE = """Get:1 http://deb.debian.org/debian bookworm InRelease [151 kB]
Ign:2 http://vendor.example/agent stable InRelease
Err:5 http://vendor.example/agent stable/main amd64 Packages
  404  Not Found [IP: 192.0.2.1 80]
Reading package lists...
E: Failed to fetch http://vendor.example/agent/dists/stable/main/binary-amd64/Packages  404  Not Found
E: Some index files failed to download. They have been ignored, or old ones used instead.
"""
REFUSED = """Err:1 http://127.0.0.1:9/x stable InRelease
  Could not connect to 127.0.0.1:9 (127.0.0.1). - connect (111: Connection refused)
W: Failed to fetch http://127.0.0.1:9/x/dists/stable/InRelease  Could not connect to 127.0.0.1:9 (127.0.0.1). - connect
W: Some index files failed to download. They have been ignored, or old ones used instead.
"""
UNSIGNED = """Get:2 https://nvidia.example/cuda/x86_64  InRelease [34.8 kB]
Err:2 https://nvidia.example/cuda/x86_64  InRelease
  The following signatures couldn't be verified because the public key is not available: NO_PUBKEY A4B469963BF863CC
Reading package lists...
W: GPG error: https://nvidia.example/cuda/x86_64  InRelease: The following signatures are unknown: NO_PUBKEY A4B4
E: The repository 'https://nvidia.example/cuda/x86_64  InRelease' is not signed.
"""
CONFLICT = """E: Conflicting values set for option Signed-By regarding source http://v.example/x/ s: /a.gpg != /b.gpg
E: The list of sources could not be read.
"""


@pytest.mark.parametrize(
    ("text", "uri", "reason"),
    [
        (GONE, "http://vendor.example/agent", "404  Not Found"),
        (REFUSED, "http://127.0.0.1:9/x", "Could not connect"),
        (UNSIGNED, "https://nvidia.example/cuda/x86_64", "NO_PUBKEY A4B4"),
    ],
)
def test_a_source_that_fails_is_found_with_its_reason(text: str, uri: str, reason: str) -> None:
    (problem,) = apt_output.problems(text)
    assert problem.uri == uri and reason in problem.message


def test_a_run_without_problems_has_none() -> None:
    assert (
        apt_output.problems("Hit:1 http://deb.debian.org/debian bookworm InRelease\nReading package lists...\n") == []
    )
    assert apt_output.unreadable(GONE + REFUSED + UNSIGNED) is None


@pytest.mark.parametrize(
    ("text", "uri", "file"),
    [
        (CONFLICT, "http://v.example/x/", ""),
        ("E: Type 'debx' is not known on line 1 in source list /etc/apt/sources.list.d/x.list", "", "x.list"),
        ("E: Malformed entry 1 in sources file /etc/apt/sources.list.d/x.sources (Suite)", "", "x.sources"),
        ("E: Malformed line 1 in source list /etc/apt/sources.list.d/x.list (type)", "", "x.list"),
    ],
)
def test_an_entry_at_which_apt_stops_is_found(text: str, uri: str, file: str) -> None:
    found = apt_output.unreadable(text)
    assert found is not None and found[0] == uri and found[1].rpartition("/")[2] == file and found[2] in text


@pytest.mark.parametrize(
    ("uri", "belongs"),
    [
        ("https://download.docker.com/linux/debian", True),
        ("http://download.docker.com/linux/debian/", True),
        ("https://download.docker.com/linux/debian/dists/bookworm/InRelease", True),
        ("https://download.docker.com/linux/debian-old", False),
        ("https://download.docker.com/linux", False),
    ],
)
def test_a_repository_is_the_kits_only_if_all_of_its_path_is(uri: str, belongs: bool) -> None:
    assert apt_output.belongs_to(uri, "https://download.docker.com/linux/debian") is belongs


def test_the_files_that_name_a_repository_are_found() -> None:
    texts = {
        "sources.list": "deb http://deb.debian.org/debian bookworm main\n# deb http://v.example/x stable main\n",
        "a.list": "deb [signed-by=/k/a.gpg] http://v.example/x/ stable main\n",
        "b.sources": "Types: deb\nURIs: https://w.example/y http://v.example/x\nSuites: stable\n",
        "c.list": "deb http://v.example/xy stable main\n",
    }
    assert apt_output.files_naming("http://v.example/x", texts) == ["a.list", "b.sources"]
    assert apt_output.files_naming("http://v.example/x/dists/stable/InRelease", texts) == ["a.list", "b.sources"]


SIMULATED = """The following packages will be REMOVED:
  containerd docker.io gpu-stack runc
Remv gpu-stack [1]
Remv docker.io [20.10.24+dfsg1-1+deb12u1+b6]
Remv libfoo:i386 [3]
Inst containerd.io (1.7.27-1 Docker:bookworm [amd64])
Inst libseccomp2 [2.5.4-1] (2.5.5-1 Debian:12 [amd64])
Conf containerd.io (1.7.27-1 Docker:bookworm [amd64])
"""


def test_a_simulation_lists_what_goes_and_what_changes() -> None:
    plan = apt_output.simulated(SIMULATED)
    assert plan.removed == ["gpu-stack", "docker.io", "libfoo"]
    assert plan.changed == {"libseccomp2": "2.5.5-1"}


def test_packages_that_dpkg_cannot_configure_are_found() -> None:
    text = "dpkg: error processing package agent (--configure):\n installed agent package post-installation script\n"
    assert apt_output.broken_packages(text + "Errors were encountered while processing:\n agent\n") == ["agent"]

"""Older source files that name the same repository are switched off; every other line stays as it is."""

import pytest
from ansible.module_utils.mixtral_run_host.apt import apt_sources

URI = "https://download.docker.com/linux/ubuntu"
KEEPER = "/etc/apt/sources.list.d/docker.sources"


@pytest.mark.parametrize(
    "line",
    [
        "deb https://download.docker.com/linux/ubuntu jammy stable",
        "deb [arch=amd64 signed-by=/usr/share/keyrings/d.gpg] https://download.docker.com/linux/ubuntu/ jammy stable",
        "deb-src http://download.docker.com/linux/ubuntu jammy stable",
        "  deb  https://download.docker.com/linux/ubuntu jammy stable",
    ],
)
def test_a_line_that_names_the_repository_is_commented_out(line: str) -> None:
    other = "deb http://archive.ubuntu.com/ubuntu jammy main\n"
    text = apt_sources.without(other + line + "\n", URI, "docker.list", KEEPER)
    assert text.startswith(other) and text.endswith("# " + line + "\n")
    assert apt_sources.without(text, URI, "docker.list", KEEPER) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# deb https://download.docker.com/linux/ubuntu jammy stable\n",
        "deb https://download.docker.com/linux/debian bookworm stable\n",
        "deb https://mirror/download.docker.com/linux/ubuntu jammy stable\n",
    ],
)
def test_other_lines_stay(text: str) -> None:
    assert apt_sources.without(text, URI, "docker.list", KEEPER) == text


def test_of_several_stanzas_only_the_repositorys_is_disabled() -> None:
    other = "Types: deb\nURIs: http://archive.ubuntu.com/ubuntu\nSuites: jammy\n"
    own = "Types: deb\nURIs: http://a/b\n  https://download.docker.com/linux/ubuntu\nSuites: jammy\nEnabled: yes\n"
    text = apt_sources.without(other + "\n" + own, URI, "all.sources", KEEPER)
    first, second = text.split("\n\n", 1)
    assert first + "\n" == other
    assert "Enabled: no\n" in second and "Enabled: yes" not in second and "Suites: jammy" in second
    assert apt_sources.without(text, URI, "all.sources", KEEPER) == text


@pytest.mark.parametrize("before", ["\n", "Types: deb\nURIs: http://a/b\nSuites: x\n\n\n", "# mine\n\n \n\n"])
def test_blank_lines_before_a_stanza_stay_before_it(before: str) -> None:
    own = f"Types: deb\nURIs: {URI}\nSuites: jammy\n"
    text = apt_sources.without(before + own, URI, "all.sources", KEEPER)
    assert text.startswith(before) and text.endswith("\nEnabled: no\n" + own)
    assert text.rsplit("\n\n", 1)[-1].lstrip().startswith("# mixtral-run")


def test_placeholders_are_filled_in_and_apts_own_are_left() -> None:
    release = {"id": "debian", "codename": "bookworm"}
    assert (
        apt_sources.expand("http://m/{id}/{codename}/$(ARCH)/{arch}", release, "amd64")
        == "http://m/debian/bookworm/$(ARCH)/amd64"
    )


def test_render_leaves_empty_fields_out() -> None:
    assert apt_sources.render([("Types", "deb"), ("Components", ""), ("Suites", "/")]) == "Types: deb\nSuites: /\n"

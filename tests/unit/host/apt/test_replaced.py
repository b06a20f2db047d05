"""Packages and files of a host that the kit replaces come back with its removal, or nothing is removed."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from tests.unit.host.conftest import call_module, load_module
from tests.unit.host.programs import Programs, programs  # noqa: F401 - a fixture

PACKAGES = load_module("apt_packages")
MD5_OF_EMPTY = "d41d8cd98f00b204e9800998ecf8427e"

# A small dpkg: lines `NAME VERSION STATUS WANT` in the file "dpkg", the versions of the archive in the file "archive".
DPKG_QUERY = """
case "$*" in
*Conffiles*) case "$*" in *docker-ce*|*docker.io*) echo " {etc}/default {md5}"; esac ;;
*Version*) cat {state} ;;
*) awk '{{print $1, $3}}' {state} ;;
esac"""
APT_GET = """
case "$*" in *\\ update*)
    if test -e {down}; then echo "E: Failed to fetch http://archive/dists/x  no route"; fi
    exit 0 ;;
esac
words=$(echo "$*" | sed 's/.* \\(install\\|remove\\|autoremove\\)//')
for word in $words; do
    case "$word" in
    -*|*::*) ;;
    *-) case "$*" in *--simulate*) echo "Remv ${{word%-}} [1]"; esac ;;
    *) case "$*" in *\\ install*)
           name=${{word%%=*}}; version=$(grep -m1 "^$name " {archive} | cut -d' ' -f2)
           case "$word" in *=*)
               test "${{word#*=}}" = "$version" || {{ echo "E: Version of $name was not found"; exit 100; }} ;;
           esac
           test -n "$version" || {{ echo "E: Unable to locate package $name"; exit 100; }}
           case "$*" in
           *--simulate*) if [ $name = docker-ce ]; then echo "Remv docker.io [20]"; echo "Remv runc [1]"; fi
               echo "Inst $name ($version x [amd64])" ;;
           *--download-only*) if test -e {down}; then echo "E: Failed to fetch $name"; exit 100; fi ;;
           *) sed -i "/^$name /d" {state}; echo "$name $version installed install" >> {state}
               if [ $name = docker-ce ]; then
                   sed -i 's/^\\(docker.io\\|runc\\) \\(.*\\) installed/\\1 \\2 config-files/' {state}
               fi ;;
           esac ;;
       *) case "$*" in
           *--simulate*) echo "Remv $word [1]" ;;
           *) sed -i "s/^$word \\(.*\\) installed/$word \\1 config-files/" {state} ;;
           esac ;;
       esac ;;
    esac
done"""
PURGE = """
if [ "$1" = --purge ]; then
    shift
    for n; do sed -i "/^$n /d" {state}; rm -f {etc}/default {etc}/default.bak; done
fi"""


class Host:
    """A host with the distribution's engine, and files of its user."""

    def __init__(self, programs: Programs, folder: Path) -> None:  # noqa: F811
        self.folder, self.programs, self.etc = folder, programs, folder / "etc"
        self.etc.mkdir()
        self.state, self.archive, self.down = folder / "dpkg", folder / "archive", folder / "down"
        self.state.write_text("bash 5 installed install\ndocker.io 20 installed hold\nrunc 1 installed install\n")
        self.archive.write_text("docker.io 20\nrunc 1\ndocker-ce 28\n")
        names = {"state": self.state, "archive": self.archive, "down": self.down, "etc": self.etc, "md5": MD5_OF_EMPTY}
        programs.put("dpkg-query", DPKG_QUERY.format(**names))
        programs.put("dpkg", PURGE.format(**names))
        programs.put("apt-get", APT_GET.format(**names))
        programs.put("apt-mark", 'if [ "$1" = showauto ]; then echo runc; fi')
        programs.put("apt-cache", f'for n; do sed -n "s/^$n \\(.*\\)/$n | \\1 | http:/p" {self.archive}; done')
        programs.put("systemctl", 'case "$1" in is-enabled) echo disabled ;; is-active) echo inactive ;; esac')
        programs.put("nvidia-smi", "exit 9")
        self.file = self.etc / "default"
        self.file.write_bytes(b"mine \xff\n")
        self.file.chmod(0o640)

    def packages(self) -> dict[str, str]:
        rows = [line.split() for line in self.state.read_text().splitlines()]
        return {row[0]: row[1] for row in rows if row[2] == "installed"}

    def call(self, **more: object) -> dict:
        given = {
            "section": "docker", "names": ["docker-ce"], "conflicting": ["docker.io", "runc"], "hold": False,
            "restore_replaced": True, "config_files": [str(self.file)], "units": ["docker.service"],
            "remove_dependents": True, **more,
        }  # fmt: skip
        return call_module(PACKAGES, self.folder / "records", **given)

    def record(self) -> dict:
        return json.loads((self.folder / "records/packages.json").read_text())


@pytest.fixture
def host(programs: Programs, tmp_path: Path) -> Host:  # noqa: F811
    return Host(programs, tmp_path)


def test_what_is_replaced_is_recorded_before_it_goes(host: Host) -> None:
    host.call(check_mode=True)
    assert not (host.folder / "records").exists()
    host.call()
    assert host.packages() == {"bash": "5", "docker-ce": "28"}
    assert host.record()["docker_replaced"] == {
        "packages": {
            "docker.io": {"automatic": False, "held": True, "offered": True, "version": "20"},
            "runc": {"automatic": True, "held": False, "offered": True, "version": "1"},
        },
        "units": {"docker.service": ["disabled", "inactive"]},
    }
    assert stat.S_IMODE((host.folder / "records/packages.json").stat().st_mode) == 0o600


def test_packages_and_files_come_back(host: Host) -> None:
    before = host.packages()
    host.call()
    preview = host.call(state="absent", check_mode=True)
    assert host.packages() != before and preview["restored"] == ["docker.io 20", "runc 1"]
    result = host.call(state="absent")
    assert not result.get("failed") and result["restored"] == preview["restored"], result
    assert host.packages() == before
    assert host.file.read_bytes() == b"mine \xff\n" and stat.S_IMODE(host.file.stat().st_mode) == 0o640
    assert not (host.folder / "records/packages.json").exists()
    marks = [call for call in host.programs.calls("apt-mark") if call.split()[1] in ("auto", "hold")]
    assert marks == ["apt-mark auto runc", "apt-mark hold docker.io"]
    assert not host.call(state="absent")["changed"]


@pytest.mark.parametrize("check_mode", [True, False])
def test_an_archive_that_does_not_answer_is_reported_before_anything_is_removed(host: Host, check_mode: bool) -> None:
    host.call()
    host.down.touch()
    if check_mode:
        host.archive.write_text("docker-ce 28\n")  # no list could be read
    before, record = host.packages(), host.record()
    result = host.call(state="absent", check_mode=check_mode)
    assert result["failed"] and "cannot be installed again" in result["msg"] and "docker.io 20" in result["msg"]
    assert "http://archive: Failed to fetch" in result["msg"] and "docker_restore_replaced: false" in result["msg"]
    assert host.packages() == before and host.record() == record
    assert not host.call(state="absent", restore_replaced=False).get("failed")
    assert host.packages() == {"bash": "5"} and host.file.exists()


@pytest.mark.parametrize("archive", ["docker.io 21\nrunc 1\n", "docker.io 21\ndocker.io 20\nrunc 1\n"])
def test_a_version_that_the_archive_no_longer_has_comes_back_as_another_and_that_is_said(
    host: Host, archive: str
) -> None:
    """The stand-in installs only the newest version, as if the older one did not fit the other packages."""
    host.call()
    host.archive.write_text(archive + "docker-ce 28\n")
    result = host.call(state="absent")
    assert host.packages() == {"bash": "5", "docker.io": "21", "runc": "1"}
    words = "the archive no longer has the old version, or it does not fit the other packages"
    assert result["notes"] == [f"docker.io 20 comes back as 21: {words}"]
    assert result["restored"] == ["docker.io 21", "runc 1"]


def test_a_package_that_no_archive_ever_had_is_named_and_left_out(host: Host) -> None:
    host.archive.write_text("docker.io 20\ndocker-ce 28\n")
    host.call()
    result = host.call(state="absent")
    assert host.packages() == {"bash": "5", "docker.io": "20"}
    assert result["notes"] == ["runc 1 does not come back: it came from no archive of this host when it was replaced"]


def test_a_run_after_a_failed_return_goes_on(host: Host) -> None:
    host.call()
    apt = (host.programs.folder / "apt-get").read_text()
    host.programs.put("apt-get", 'case "$*" in *simulate*|*download*|*update*) ;; *install*) exit 100 ;; esac', apt)
    result = host.call(state="absent")
    assert result["failed"] and "the same command again" in result["msg"] and host.packages() == {"bash": "5"}
    assert host.file.read_bytes() == b"mine \xff\n"
    host.programs.put("apt-get", apt)
    assert not host.call(state="absent").get("failed")
    assert host.packages() == {"bash": "5", "docker.io": "20", "runc": "1"}


def test_what_somebody_wrote_since_is_kept_and_what_the_package_brought_goes(host: Host) -> None:
    host.state.write_text("bash 5 installed install\n")
    host.file.unlink()
    host.call()
    host.file.write_text("")  # as shipped
    host.call(state="absent")
    assert not host.file.exists()
    host.call()
    host.file.write_text("edited")
    (host.etc / "default.bak").write_text("a copy")
    host.call(state="absent")
    assert host.file.read_text() == "edited" and (host.etc / "default.bak").read_text() == "a copy"


def test_a_link_to_a_file_of_somebody_comes_back_as_a_link(host: Host) -> None:
    host.file.rename(host.etc / "managed")
    host.file.symlink_to("managed")
    host.call()
    host.programs.put("dpkg", PURGE.format(state=host.state, etc=host.etc), f"rm -f {host.etc}/managed")
    host.call(state="absent")
    assert host.file.readlink() == Path("managed") and host.file.read_bytes() == b"mine \xff\n"


def test_every_container_is_named_before_anything_is_removed(host: Host) -> None:
    host.call()
    host.programs.put("systemctl", "echo active")
    host.programs.put("docker", "echo a b c d e f")
    host.programs.put("nvidia-smi", "echo 4711")
    before = host.packages()
    result = host.call(state="absent", restart_when_busy=False)
    assert "6 containers running (a, b, c, d, e, f); GPU processes are running (pid 4711)" in result["msg"]
    assert host.packages() == before

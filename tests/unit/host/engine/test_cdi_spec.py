"""The CDI spec, whoever writes it: a stale one never stays in the way of a fresh one."""

from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host import probe

from tests.unit.host.conftest import call_module, load_module
from tests.unit.host.programs import Programs, programs  # noqa: F401 - a fixture

MODULE = load_module("nvidia_runtime")
SPEC = 'kind: nvidia.com/gpu\ndevices:\n  - name: "0"\nmounts:\n  - hostPath: /usr/lib/libcuda.so.{}\n'


class Host:
    """A host with one GPU; `etc` is read before `run`, into which the toolkit's unit writes."""

    def __init__(self, programs: Programs, folder: Path) -> None:  # noqa: F811
        self.programs, self.records = programs, folder / "records"
        self.etc, self.run = folder / "etc/nvidia.yaml", folder / "run/nvidia.yaml"
        self.etc.parent.mkdir()
        self.run.parent.mkdir()
        programs.put("systemctl", "exit 1")
        programs.put("docker", "exit 1")
        self.driver("550.1")

    def driver(self, version: str) -> None:
        """Another driver, and a toolkit that knows it."""
        self.version = version
        self.programs.put("nvidia-smi", f"echo '0, H100, GPU-1, 81559, {version}, 31, 0'")
        spec = self.etc.parent.parent / "fresh"
        spec.write_text(SPEC.format(version))
        self.programs.put(
            "nvidia-ctk",
            'case "$3" in --output=*) cp ' + str(spec) + ' "${3#--output=}" ;; esac',
            "echo version 1.17.8",
        )
        self.fresh = spec.read_text()

    def unit(self, target: Path) -> None:
        """The toolkit's systemd unit, as it is set up to write `target`."""
        self.programs.put("systemctl", f'[ "$1" != restart ] || cp {self.etc.parent.parent}/fresh {target}')

    def call(self, **more: object) -> dict:
        result = call_module(MODULE, self.records, host="gpu-01", cdi_path=str(self.etc), **more)
        assert not result.get("failed"), result
        return result


@pytest.fixture
def host(programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:  # noqa: F811
    found = Host(programs, tmp_path)
    folders = [str(found.etc.parent), str(found.run.parent)]
    looked = probe.cdi
    monkeypatch.setattr(MODULE, "UNIT_FOLDER", folders[1])
    monkeypatch.setattr(probe, "cdi", lambda where=folders: looked(where))
    return found


def test_an_old_toolkits_spec_is_the_kits_and_leaves_with_it(host: Host) -> None:
    assert host.call()["changed"] and host.etc.read_text() == host.fresh
    assert not host.call()["changed"]
    host.driver("570.1")
    assert host.call()["changed"] and "570.1" in host.etc.read_text()
    assert list(host.etc.parent.iterdir()) == [host.etc], "no backup of the kit's own"
    host.call(state="absent")
    assert not host.etc.exists()


@pytest.mark.parametrize("version", ["550.1", "570.1"])
def test_the_kits_own_goes_once_the_toolkits_unit_writes(host: Host, version: str) -> None:
    host.call()
    host.driver(version)
    host.unit(host.run)
    host.run.write_text(SPEC.format("550.1"))
    assert host.call()["changed"]
    assert not host.etc.exists() and host.run.read_text() == host.fresh
    assert not host.call()["changed"]


def test_a_users_stale_spec_is_written_again_and_kept_beside_it(host: Host) -> None:
    host.etc.write_text(SPEC.format("470.1"))
    host.unit(host.run)
    assert host.call()["changed"]
    backup = host.etc.with_name("nvidia.yaml.mixtral-run.bak")
    assert host.etc.read_text() == host.fresh == host.run.read_text() and "470.1" in backup.read_text()
    assert not host.call()["changed"]
    host.call(state="absent")
    assert host.etc.exists() and backup.exists()


@pytest.mark.parametrize("writes", [True, False])
def test_a_unit_that_writes_elsewhere_or_nothing_is_no_obstacle(host: Host, writes: bool) -> None:
    host.call()
    host.driver("570.1")
    host.unit(host.etc if writes else host.etc.with_name("else"))
    assert host.call()["changed"] and host.etc.read_text() == host.fresh
    assert not host.call()["changed"]


@pytest.mark.parametrize(
    ("mode", "words"),
    [("Enabled", "GPU 0 is in MIG mode"), ("Disabled", "`nvidia-smi mig -lgi`"), ("[N/A]", "MIG mode")],
)
def test_fewer_gpus_in_a_container_name_mig_as_a_cause(host: Host, tmp_path: Path, mode: str, words: str) -> None:
    info = '{"ServerVersion": "29.1", "Runtimes": {"nvidia": {}}}'
    host.programs.put(
        "docker", f"case $1 in info) echo '{info}' ;; image) echo sha256:1 ;; run) echo 0 ;; esac", "exit 0"
    )
    host.programs.put(
        "nvidia-smi",
        f"case $1 in *mig.mode*) echo 'Enabled, {mode}, [N/A], [N/A]' ;;",
        f"*) echo '0, H100, GPU-1, 81559, {host.version}, 31, 0' ;; esac",
    )
    result = call_module(MODULE, host.records, host="gpu-01", cdi_path=str(host.etc), image="kit")
    assert result["failed"] and words in result["msg"] and "found:    0 GPUs" in result["msg"]

"""dockerd starts only if no setting is both on its command line and in daemon.json; the host's own settings stay."""

from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host.commands import Result
from ansible.module_utils.mixtral_run_host.engine import daemon_settings, engine_flags, engine_unit

DEFAULTS = {
    "log-driver": "json-file",
    "log-opts": {"max-size": "100m", "max-file": "5"},
    "live-restore": True,
    "default-ulimits": {"nofile": {"Name": "nofile", "Soft": 1048576, "Hard": 1048576}},
}


def _merged(current: dict, words: str = "", settings: dict | None = None, owned: list | None = None, **needed: str):
    """Return daemon.json after the kit, with what is then the kit's, and the settled decision."""
    given = engine_flags.flags(words.split())
    settled = engine_flags.settle(settings or {}, DEFAULTS, needed, current, owned or [], given)
    return *daemon_settings.merge(current, settled.settings, owned or []), settled


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("-H fd:// --containerd=/run/c.sock", {"hosts": ["fd://"], "containerd": ["/run/c.sock"]}),
        (
            "--log-driver journald -D --live-restore",
            {"log-driver": ["journald"], "debug": ["true"], "live-restore": ["true"]},
        ),
        ("--live-restore=false --label a=b --label=c=d", {"live-restore": ["false"], "labels": ["a=b", "c=d"]}),
        ("-g /data --default-ulimit nofile=1:2", {"data-root": ["/data"], "default-ulimits": ["nofile=1:2"]}),
        ("-Hunix:///x -l=debug", {"hosts": ["unix:///x"], "log-level": ["debug"]}),
        ("--iptables --bip 10.0.0.1/24", {"iptables": ["true"], "bip": ["10.0.0.1/24"]}),
    ],
)
def test_flags_are_read_under_the_names_of_the_file(words: str, found: dict) -> None:
    assert engine_flags.flags(words.split()) == found


def test_a_bare_host_gets_all_that_the_kit_prefers() -> None:
    settings, _, settled = _merged({})
    assert settings == DEFAULTS and not settled.conflicts and not settled.kept


@pytest.mark.parametrize(
    "words",
    ["--log-driver=journald", "--live-restore=false", "--default-ulimit nofile=1024:2048", "--log-opt max-size=1m"],
)
def test_a_flag_is_not_repeated_in_the_file(words: str) -> None:
    settings, _, settled = _merged({"debug": True}, words)
    assert not set(settings) & set(engine_flags.flags(words.split())) and settings["debug"]
    assert not settled.conflicts and any(words.split("=")[0].split()[0] in kept for kept in settled.kept)


def test_options_of_one_log_driver_are_not_given_to_another() -> None:
    for current, words in (({}, "--log-driver=journald"), ({"log-driver": "local"}, "")):
        settings, _, _ = _merged(current, words)
        assert "log-opts" not in settings and settings.get("log-driver") == current.get("log-driver")
    settings, _, _ = _merged({}, settings={"log-driver": "journald"})
    assert settings["log-driver"] == "journald" and "log-opts" not in settings
    assert _merged({"log-driver": "json-file"})[0]["log-opts"] == DEFAULTS["log-opts"]


def test_the_hosts_own_settings_stay_and_what_it_lacks_is_added() -> None:
    theirs = {
        "live-restore": False,
        "log-opts": {"labels": "job", "max-size": "1m"},
        "default-ulimits": {"nofile": {"Name": "nofile", "Soft": 1024, "Hard": 1024}},
    }
    settings, owned, settled = _merged(theirs)
    assert settings == {**theirs, "log-driver": "json-file", "log-opts": {**theirs["log-opts"], "max-file": "5"}}
    assert "live-restore false" in settled.kept
    # The second run changes nothing, and what the kit leaves is what it found.
    assert _merged(settings, owned=owned)[:2] == (settings, owned)
    assert daemon_settings.merge(settings, {}, owned)[0] == theirs


def test_a_value_of_the_kit_that_somebody_edits_is_restored() -> None:
    settings, owned, _ = _merged({})
    settings["log-opts"]["max-size"] = "1k"
    assert _merged(settings, owned=owned)[0] == DEFAULTS


def test_a_value_that_an_earlier_kit_replaced_returns() -> None:
    owned = [{"path": ["log-driver"], "value": "json-file", "before": "local"}]
    settings, owned, _ = _merged({"log-driver": "json-file"}, owned=owned)
    assert settings["log-driver"] == "local" and ["log-driver"] not in [entry["path"] for entry in owned]


def test_a_flag_that_comes_later_takes_the_kits_value_out_of_the_file() -> None:
    settings, owned, _ = _merged({})
    after, _, settled = _merged(settings, "--log-driver=journald", owned=owned)
    assert "log-driver" not in after and "log-opts" not in after and not settled.conflicts


def test_what_the_operator_asks_for_replaces_the_hosts_value_and_keeps_what_the_kit_prefers_beside_it() -> None:
    settings, _, settled = _merged(
        {"log-driver": "local"}, settings={"log-driver": "json-file", "log-opts": {"tag": "x"}}
    )
    assert settings["log-driver"] == "json-file" and not settled.conflicts
    assert settings["log-opts"] == {"max-size": "100m", "max-file": "5", "tag": "x"}


def test_a_flag_that_contradicts_the_operator_is_a_conflict_and_one_that_agrees_is_none() -> None:
    asked = {"data-root": "/data", "registry-mirrors": ["https://m"]}
    _, _, settled = _merged({}, "--data-root=/old --registry-mirror https://m", settings=asked)
    ((expected, found, step),) = settled.conflicts
    assert expected == 'data-root "/data"' and found == "the unit's flag --data-root=/old" and "systemctl cat" in step
    assert "registry-mirrors" not in settled.settings
    assert not _merged({}, "--data-root=/data", settings=asked)[2].conflicts


def test_a_setting_in_both_places_is_a_conflict() -> None:
    ((expected, found, _),) = _merged({"hosts": ["tcp://0.0.0.0"]}, "-H fd://")[2].conflicts
    assert expected == "hosts in one place only" and "--host=fd://" in found


def test_another_data_root_is_not_hidden() -> None:
    ((expected, found, _),) = _merged({"data-root": "/srv/docker"}, **{"data-root": "/data"})[2].conflicts
    assert "/data" in expected and "/srv/docker" in found
    settings, owned, _ = _merged({}, **{"data-root": "/data"})
    assert not _merged(settings, owned=owned, **{"data-root": "/other"})[2].conflicts


def test_variables_of_the_unit_are_expanded() -> None:
    words = ["/usr/sbin/dockerd", "-H", "fd://", "$DOCKER_OPTS", "--data-root=${ROOT}", "$NONE"]
    found = engine_flags.expand(words, {"DOCKER_OPTS": "--log-driver=local --debug", "ROOT": "/data"})
    assert found == ["/usr/sbin/dockerd", "-H", "fd://", "--log-driver=local", "--debug", "--data-root=/data"]


NO_SETTINGS = {"settings": {}, "defaults": {}, "needed": {}, "path": "/no/daemon.json"}


@pytest.fixture
def other_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the folder that stands for `/` of a host without any engine."""
    monkeypatch.setattr(engine_unit, "SNAP", tuple(f"{tmp_path}{path}" for path in engine_unit.SNAP))
    monkeypatch.setattr(engine_unit, "ROOTLESS", tuple(f"{tmp_path}{path}" for path in engine_unit.ROOTLESS))
    monkeypatch.setattr(engine_unit, "run", lambda *_: Result(1, "", ""))
    return tmp_path


def _conflicts() -> list:
    return engine_unit.conflicts({**NO_SETTINGS, "conflicting": ["docker.io"]}, [])[0]


def test_docker_from_snap_is_a_conflict_and_rootless_docker_a_warning(other_engines: Path) -> None:
    assert _conflicts() == []
    (other_engines / "snap/docker/current").mkdir(parents=True)
    unit = other_engines / "home/ana/.config/systemd/user/docker.service"
    unit.parent.mkdir(parents=True)
    unit.touch()
    (snap, rootless) = _conflicts()
    assert snap[0] == "fail" and "same socket" in snap[2] and "snap remove docker" in snap[3]
    assert rootless[0] == "warn" and "ana" in rootless[2] and "docker context use default" in rootless[3]


@pytest.mark.parametrize(("owner", "conflict"), [("docker.io", True), ("docker-ce", False)])
def test_a_unit_that_starts_a_program_of_a_removed_package_is_a_conflict(
    other_engines: Path, monkeypatch: pytest.MonkeyPatch, owner: str, conflict: bool
) -> None:
    monkeypatch.setattr(engine_unit, "unit", lambda: {"argv": ["/usr/sbin/dockerd"], "files": ["/etc/x.conf"]})
    monkeypatch.setattr(engine_unit, "run", lambda *_: Result(0, f"{owner}: /usr/sbin/dockerd\n", ""))
    found = _conflicts()
    assert bool(found) is conflict
    assert not conflict or ("/etc/x.conf starts /usr/sbin/dockerd of the package docker.io" in found[0][2])


@pytest.mark.parametrize("by_flag", [True, False])
def test_an_engine_in_a_swarm_does_not_get_live_restore(tmp_path: Path, by_flag: bool) -> None:
    current = {} if by_flag else {"data-root": str(tmp_path)}
    given = {"data-root": [str(tmp_path)]} if by_flag else {}
    assert engine_unit.usable_defaults(DEFAULTS, current, given) == DEFAULTS
    (tmp_path / "swarm").mkdir()
    (tmp_path / "swarm/docker-state.json").touch()
    assert set(DEFAULTS) - set(engine_unit.usable_defaults(DEFAULTS, current, given)) == {"live-restore"}


def test_the_unit_is_read_with_the_files_that_somebody_wrote(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    options = tmp_path / "docker"
    options.write_text('# DOCKER_OPTS="--bip=1"\nDOCKER_OPTS="--log-driver=local"\n')
    shown = (
        "EnvironmentFiles=" + str(options) + " (ignore_errors=yes)\nEnvironment=ROOT=/data HTTP_PROXY=http://p:1\n"
        "ExecStart={ path=/usr/bin/dockerd ; argv[]=/usr/bin/dockerd -H fd:// $DOCKER_OPTS --data-root=${ROOT} ; "
        "ignore_errors=no ; start_time=[n/a] ; stop_time=[n/a] ; pid=0 ; code=(null) ; status=0/0 }\n"
        "FragmentPath=/lib/systemd/system/docker.service\nDropInPaths=/etc/systemd/system/docker.service.d/x.conf\n"
    )
    monkeypatch.setattr(engine_unit, "run", lambda *_: Result(0, shown, ""))
    real = engine_unit.read_text
    monkeypatch.setattr(
        engine_unit, "read_text", lambda path, *rest: "ExecStart=" if path.endswith("x.conf") else real(path, *rest)
    )
    found = engine_unit.unit()
    assert found["argv"] == ["/usr/bin/dockerd", "-H", "fd://", "--log-driver=local", "--data-root=/data"]
    assert found["files"] == ["/etc/systemd/system/docker.service.d/x.conf"]

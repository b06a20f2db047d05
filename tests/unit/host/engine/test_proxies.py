"""A proxy is used, but for hosts that no_proxy names; what its address holds reaches its place."""

import http.server
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import jinja2.nativetypes
import pytest
import yaml
from ansible.module_utils.mixtral_run_host.commands import Result

from tests.unit.host.conftest import ROOT, call_module, load_module
from tests.unit.host.programs import Programs, preflight_script, programs  # noqa: F401 - a fixture

DEAD_PROXY = "http://127.0.0.1:9"


@pytest.fixture
def mirror() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.setenv(name, "")
    # urllib keeps the proxies of its first request, also for the tests that follow.
    monkeypatch.setattr(urllib.request, "_opener", None)


NO_PROXY = pytest.mark.parametrize(("no_proxy", "answers"), [("localhost,127.0.0.1", True), ("localhost", False)])


@NO_PROXY
def test_preflight_asks_a_mirror(mirror: str, tmp_path, monkeypatch, no_proxy: str, answers: bool) -> None:
    module = load_module("preflight")
    monkeypatch.setattr(module.probe, "machine", lambda _: {"disks": [], "memory": {"ram_gib": 1}})
    monkeypatch.setattr(module.shortfalls, "collect", lambda *_: [])
    url = mirror + "/{arch}/$(ARCH)"
    limits = {"planned_swap_gib": 0, "free_gib": 1}
    folders = {**dict.fromkeys(("hf_cache", "swap", "tmp"), str(tmp_path)), "data_root": "", "containerd_root": ""}
    result = call_module(
        module, tmp_path, host="gpu-01", limits=limits, mirrors=[url], proxy=DEAD_PROXY, no_proxy=no_proxy,
        folders=folders, image="kit",
    )  # fmt: skip
    state = result["ansible_facts"]["mixtral_run"]
    arch = module.probe.architecture()
    assert (state["mirrors"] == {f"{mirror}/{arch}/{arch}": None}) is answers
    # A name that only the proxy resolves is not asked for.
    assert bool(state["dns"]) is answers


@NO_PROXY
def test_a_repositorys_key_is_fetched(mirror: str, tmp_path, no_proxy: str, answers: bool) -> None:
    result = call_module(
        load_module("apt_source"), tmp_path, name="docker", uri=mirror, key_url=mirror + "/",
        key_fingerprint="F" * 40, proxy=DEAD_PROXY, no_proxy=no_proxy,
    )  # fmt: skip
    assert ("cannot be fetched" in result["msg"]) is not answers


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt is asked itself")
@pytest.mark.parametrize(
    ("no_proxy", "answers"),
    [("localhost", True), ("other, .localhost", True), ("other,*", True), ("other,host.localhost", False), ("", False)],
)
def test_apt_asks_a_mirror(mirror: str, tmp_path: Path, monkeypatch, no_proxy: str, answers: bool) -> None:
    for name in ("lists/partial", "cache/archives/partial", "parts"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "sources.list").write_text(f"deb [trusted=yes] {mirror.replace('127.0.0.1', 'localhost')} ./\n")
    (tmp_path / "apt.conf").write_text(
        f'Dir::Etc::SourceList "{tmp_path}/sources.list"; Dir::Etc::SourceParts "{tmp_path}/parts";\n'
        f'Dir::State::Lists "{tmp_path}/lists"; Dir::Cache "{tmp_path}/cache"; Acquire::Retries "0";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    params = {"proxy": DEAD_PROXY, "no_proxy": no_proxy, "lock_timeout_seconds": 0}
    answer = load_module("apt_packages").Apt(params).run(["update"])
    # The mirror has no index, and says so; the proxy is not there at all.
    assert ("404  File not found" in answer.out + answer.err) is answers, answer


def test_the_arguments_of_apt_hold_no_password(programs: Programs, tmp_path: Path) -> None:  # noqa: F811
    programs.put(
        "apt-get",
        f'for word; do case "$word" in --config-file=*) cp -p "${{word#*=}}" {tmp_path}/given.conf ;; esac; done',
    )
    params = {"proxy": 'http://me:p%40"s s@p:3128', "no_proxy": "", "lock_timeout_seconds": 0}
    assert load_module("apt_packages").Apt(params).run(["update"]).code == 0
    assert programs.calls("apt-get") and not any("p%40" in call for call in programs.calls())
    given = tmp_path / "given.conf"
    address = "http://me:p%40%22s%20s@p:3128"
    assert given.read_text() == f'Acquire::http::Proxy "{address}";\nAcquire::https::Proxy "{address}";\n'
    assert given.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt is asked itself")
def test_the_proxy_overrides_the_one_of_the_hosts_own_settings(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "apt.conf").write_text('Acquire::http::Proxy "http://old:1"; Acquire::https::Proxy "http://old:1";\n')
    (tmp_path / "apt-get").write_text('#!/bin/sh\nexec apt-config "$@"\n')
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    module = load_module("apt_packages")
    apt = sys.modules[module.Apt.__module__]
    real = apt.run
    # apt-config does not know --yes, which only apt-get has.
    monkeypatch.setattr(apt, "run", lambda argv, **rest: real([word for word in argv if word != "--yes"], **rest))
    params = {"proxy": "http://me:p%40;#//s@p:3128", "no_proxy": "", "lock_timeout_seconds": 0}
    shown = module.Apt(params).run(["dump"])
    assert 'Acquire::http::Proxy "http://me:p%40;#//s@p:3128";' in shown.out, shown
    assert "//old:1" not in shown.out


@pytest.mark.parametrize(
    ("proxy", "no_proxy", "given"),
    [("", "localhost", "none none "), ("http://p:3128", "*", "none none "),
     ("http://me:p$s@p:3128", "a, .b", "http://me:p$s@p:3128 http://me:p$s@p:3128 a,.b")],
)  # fmt: skip
def test_a_host_without_python_gets_it_by_the_proxy(
    programs: Programs, tmp_path: Path, proxy: str, no_proxy: str, given: str  # noqa: F811
) -> None:  # fmt: skip
    programs.put("python3", "exit 1")
    programs.put("apt-get", f'echo "${{http_proxy:-none}} ${{https_proxy:-none}} $no_proxy" > {tmp_path}/given')
    subprocess.run(["/bin/sh", "-c", preflight_script(proxy, no_proxy)], check=True, capture_output=True)
    assert (tmp_path / "given").read_text() == given + "\n"


def test_a_build_of_megatron_bridge_gets_the_proxy(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, ref, builds = load_module("kit_image"), "a" * 40, []
    (tmp_path / "Megatron-Bridge/docker").mkdir(parents=True)
    (tmp_path / "Megatron-Bridge/docker/Dockerfile").touch()
    monkeypatch.setattr(module, "WORK_FOLDER", str(tmp_path))

    def run(argv: list[str], **_: object) -> Result:
        builds.extend([argv] if argv[:2] == ["docker", "build"] else [])
        return Result(int(argv[1] == "image"), "", "")

    monkeypatch.setattr(module, "run", run)
    call_module(
        module, tmp_path / "records", host="gpu-01", source="megatron_bridge", name="kit:local", inputs="x", ref=ref,
        variant="cpu", dockerfile="docker/Dockerfile", proxy="http://p:3128", no_proxy="mirror",
    )  # fmt: skip
    (argv,) = builds
    given = [argv[place + 1] for place, word in enumerate(argv) if word == "--build-arg"]
    names = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
    assert given == sorted([*(f"{name}=http://p:3128" for name in names), "NO_PROXY=mirror", "no_proxy=mirror"])


def test_systemd_takes_no_percent_sign_of_a_proxys_password_for_its_own() -> None:
    texts = yaml.safe_load((ROOT / "roles/docker/vars/main.yml").read_text())
    environment = jinja2.nativetypes.NativeEnvironment()
    values = {"docker_proxy": "http://me:p%40ss@proxy:3128", "docker_no_proxy": "localhost"}
    values["__docker_unit_proxy"] = environment.from_string(texts["__docker_unit_proxy"]).render(values)
    rendered = environment.from_string(texts["__docker_environment"]).render(values)
    proxy = "http://me:p%%40ss@proxy:3128"
    assert rendered == {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "NO_PROXY": "localhost"}

"""Jobs on the hosts that are set up: answers, a conversation, a server, tests, several hosts, and secrets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mixtral_run.fleet.testhosts import hosts as targets
from tests.hosts.conftest import seen_arguments
from tests.hosts.end_to_end.fleet import (
    CHECKPOINTS,
    IMAGE,
    JOB,
    LAYOUT,
    MODELS,
    NAMES,
    SETTINGS,
    TOKEN,
    Fleet,
    Operator,
    answer_prompt,
    changed_hosts,
    ended,
)
from tests.support.servers.hub_server import COMMIT, NAME, serving

pytestmark = pytest.mark.timeout(1800)


def test_convert_on_a_host_writes_what_up_has_written(fleet: Fleet, set_up: Callable[[str], str]) -> None:
    """The same bytes, owners and modes on the second host, by `convert --on`, as on the first, by `up`."""
    for name in NAMES:
        set_up(name)
    script = (
        f"cd {CHECKPOINTS} && find base -printf '%p %U:%G %m\\n' | sort && "
        "find base -name '*.distcp' | sort | xargs sha256sum"
    )
    first, second = (fleet.hosts[name].shell(script) for name in NAMES)
    assert first == second and first.count(".distcp") >= 4


def test_the_adapter_answers_in_json(operator: Operator, set_up: Callable[[str], str]) -> None:
    instruction = 'Say "it\'s $(one)".'
    done = operator.call(
        "generate", "--on", set_up(NAMES[0]), *JOB, "--load", "base", "--adapter", "adapter",
        "--instruction", instruction, "--max-new-tokens", "4", "--json", *LAYOUT[:4],
    )  # fmt: skip
    (answer,) = json.loads(done.stdout)
    assert answer["prompt"] == instruction
    assert 1 <= answer["num_tokens"] <= 4
    assert "Loaded /checkpoints/base with /checkpoints/adapter" in done.stderr


def test_it_is_talked_to_in_a_terminal(operator: Operator, fleet: Fleet, set_up: Callable[[str], str]) -> None:
    """`chat`, `shell` and `runs` over SSH: streaming, Ctrl-C, exit codes, and nothing that stays behind."""
    on, host = ("--on", set_up(NAMES[0]), *JOB), fleet.hosts[NAMES[0]]
    talk = ("chat", *on, "--load", "base", "--adapter", "adapter", "--max-new-tokens", "400", *LAYOUT[:4])
    with operator.terminal(*talk) as chat:
        chat.expect("Write a message")
        # The base's weights are random and the same everywhere: its answer is a long one.
        for line, answer in (("/adapter off", "adapter is off"), ("Name a color.", r"color\.\r\n\S+")):
            chat.expect_exact("> ")
            chat.sendline(line)
            chat.expect(answer)
        chat.sendintr()
        chat.expect_exact("(Stopped.)")
        chat.expect_exact("> ")
        chat.sendintr()
        chat.expect_exact("(to end: /quit or Ctrl-D)")
        chat.sendline("/quit")
        assert ended(chat) == 0
    with operator.terminal("shell", *on) as shell:
        shell.expect(r"\$ ")
        # Docker tells the container the size of the terminal after its start.
        shell.sendline(
            'until [ "$(stty size)" = "40 120" ]; do sleep 0.1; done; ls -d /checkpoints/base; echo $((6*7))'
        )
        shell.expect_exact("/checkpoints/base\r\n42\r\n")
        # Ctrl-C before the command runs would reach the line editor, and drop what is typed behind it.
        shell.sendline("echo begun $((40+2)); sleep 1000")
        shell.expect_exact("begun 42\r\n")
        shell.sendintr()
        shell.expect(r"\$ ")
        shell.sendline("exit 7")
        assert ended(shell) == 7
    with subprocess.Popen(
        [sys.executable, "-m", "mixtral_run", "shell", *on, "sh", "-c", "echo runs; sleep 1000"],
        cwd=operator.folder, env=operator.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
    ) as piped:  # fmt: skip
        assert piped.stdout is not None and piped.stdout.readline() == b"runs\n"
        piped.terminate()
        assert piped.wait(60) == 143
    assert host.run("docker", "ps", "--quiet") == ""
    (row,) = json.loads(operator.call("runs", *on[:2], "adapter", "--json").stdout)["runs"]
    assert (row["iteration"], row["host"]) == (4, on[1].split("@")[1])


def test_it_is_served(operator: Operator, fleet: Fleet, set_up: Callable[[str], str]) -> None:
    """`serve` with a STAND-IN engine (tests/hosts/files/vllm): start, health, logs, port, refusals and stop."""
    on, host = ("--on", set_up(NAMES[0]), *JOB), fleet.hosts[NAMES[0]]
    host.run("mkdir", "/srv/engine")
    targets.put(host, (Path(__file__).parents[1] / "files/vllm").read_text(), "/srv/engine/vllm", "755")
    build = "printf 'FROM %s\\nCOPY vllm /usr/local/bin/vllm\\n' {} | docker build -q -t engine:standin -f - ."
    host.shell("cd /srv/engine && " + build.format(IMAGE))
    serve = ("serve", *on, "--engine-image", "engine:standin", "--port", "8123", "--load", f"{MODELS}/tiny")
    assert "a checkpoint that finetune saved" in operator.run(*serve, "--adapter", "adapter", code=5)
    operator.run("export", *on, "--adapter", "adapter", "--format", "vllm", "--output-path", "served")
    served = operator.run(*serve, "--adapter", "served")
    assert "serves on port 8123, of the host only" in served
    listening = {line.split()[3] for line in host.run("ss", "-Hltn").splitlines()}
    assert {each for each in listening if each.endswith(":8123")} == {"127.0.0.1:8123"}
    ask = (
        "import json, urllib.request as u; r = u.Request('http://127.0.0.1:8123/v1/completions', "
        "json.dumps({'model': 'adapter', 'prompt': 'Once'}).encode()); print(u.urlopen(r).read().decode())"
    )
    assert json.loads(host.run("python3", "-c", ask))["choices"][0]["text"] == "adapter: Once"
    assert "STAND-IN: Application startup complete." in operator.run("logs", "serve-", *on[:2])
    assert "Another job uses the GPUs" in operator.run(*serve, code=3)
    assert "Port 8123 of" in operator.run(*serve, "--share", code=3)
    assert "(exit code 0)" in operator.run("stop", "serve-", *on[:2])
    assert host.run("docker", "ps", "--quiet") == "" and ":8123" not in host.run("ss", "-Hltn")


def test_the_smoke_test_runs_there_and_its_report_is_fetched(operator: Operator, set_up: Callable[[str], str]) -> None:
    on = ("--on", set_up(NAMES[0]))
    output = operator.run(
        "smoke", *on, *JOB, "--load", "base", "--work-path", "smoke", *LAYOUT[:4],
        "--train-iters", "2", "--seq-length", "48", "--global-batch-size", "2",
    )  # fmt: skip
    assert "already done" in output
    assert "Smoke test passed" in output
    operator.run("fetch", "smoke-", *on)
    report = json.loads((operator.folder / "smoke/report.json").read_text())
    assert report["passed"] is True


def test_two_hosts_train_one_job(operator: Operator, set_up: Callable[[str], str]) -> None:
    both = ",".join(set_up(name) for name in NAMES)
    words = ("--load", "base", "--mock-data", "--nproc-per-node", "1", "--nccl-timeout", "600", *LAYOUT)
    output = operator.run("pretrain", "--on", both, *JOB, *words)
    assert re.search(r"127\.0\.0\.1:\d+ \| .*iteration 4/4", output)
    assert "2 × cpu" in output


def test_the_images_hf_downloads_the_model(operator: Operator, fleet: Fleet, set_up: Callable[[str], str]) -> None:
    host = fleet.hosts[NAMES[0]]
    gateway = host.shell("ip route show default").split()[2]  # this machine's address as seen from the host
    with serving(operator.folder / "hf-model", "0.0.0.0") as hub:
        model = {"hf_cache_model": NAME, "hf_cache_endpoint": f"http://{gateway}:{hub.server_address[1]}"}
        words = ("bootstrap", set_up(NAMES[0]), *SETTINGS, "--tags", "hf_cache", "-e", json.dumps(model))
        assert min(changed_hosts(operator.run(*words)).values()) > 0
        sent = list(hub.sent)
        assert "config.json" in sent and f"Bearer {TOKEN}" in hub.tokens
        assert changed_hosts(operator.run(*words)) == {set_up(NAMES[0]).split("@")[1]: 0}
        assert hub.sent == sent
    snapshot = f"/var/lib/mixtral-run/huggingface/hub/models--{NAME.replace('/', '--')}/snapshots/{COMMIT}"
    found = json.loads(host.run("cat", f"{snapshot}/config.json"))
    assert found == json.loads((operator.folder / "hf-model/config.json").read_text())


def test_a_host_that_dies_stops_the_other(operator: Operator, fleet: Fleet, set_up: Callable[[str], str]) -> None:
    both = ",".join(set_up(name) for name in NAMES)
    words = ("--load", "base", "--mock-data", "--nproc-per-node", "1", *LAYOUT[:-1], "10000")
    started = operator.run("pretrain", "--on", both, *JOB, *words, "--detach")
    (job,) = re.findall(r"^(pretrain-\S+) runs on", started, re.MULTILINE)
    fleet.hosts[NAMES[1]].run("docker", "kill", job)
    output = operator.run("logs", "-f", job, "--on", both, code=6)
    assert "ended with exit code 137: stopping the job on" in output
    assert job not in operator.run("jobs", "--running")


def test_the_token_is_on_the_host_in_one_file_and_nowhere_else_and_nothing_listens(
    operator: Operator, fleet: Fleet, set_up: Callable[[str], str]
) -> None:
    # This other token is typed in. No host has it yet, so it must be sent. It contains TOKEN, which the test looks for.
    typed = TOKEN + "Typed"
    words = ("-e", "@variables.json", "--tags", "hf_cache", "--diff", "--hf-token-file", "-")
    talkative = replace(operator, environment={**operator.environment, "ANSIBLE_VERBOSITY": "3", "ANSIBLE_DEBUG": "1"})
    with seen_arguments() as seen:
        answer_prompt(talkative, ("bootstrap", *map(set_up, NAMES), *words), "Hugging Face token", typed)
    (operator.folder / "token").write_text(typed)
    assert any("ansible-playbook" in each for each in seen)
    assert any(each.startswith("sudo ") for each in seen)  # on the hosts
    assert not any(TOKEN in each for each in seen)
    for host in fleet.hosts.values():
        home = "/var/lib/mixtral-run/huggingface/token"
        assert host.run("stat", "-c", "%a", home).strip() == "640"
        assert host.run("cat", home).strip() == typed
        found = host.shell(
            f"grep -rlF {TOKEN} /etc /home /root /tmp /var/log /run/log /var/lib/mixtral-run /srv 2>/dev/null; "
            f"journalctl --no-pager | grep -cF {TOKEN}; "
            f"docker ps -aq | xargs -r docker inspect | grep -cF {TOKEN}",
            check=False,
        )
        assert found.split() == [home, "0", "0"]
        # containerd itself listens on loopback.
        listening = {line.split()[3] for line in host.run("ss", "-Hltn").splitlines()}
        assert {each for each in listening if not each.startswith("127.")} == {"0.0.0.0:22", "[::]:22"}
    kept = [file.read_text(errors="replace") for file in (operator.folder / "state").rglob("*") if file.is_file()]
    assert any("VALUE_SPECIFIED_IN_NO_LOG_PARAMETER" in each for each in kept)  # -vvv shows all options
    assert not any(TOKEN in each for each in kept)

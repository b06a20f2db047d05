from __future__ import annotations

import time
from pathlib import Path

import pytest

from mixtral_run.errors import ConfigError
from mixtral_run.fleet.explain.explain import explain, find, recognize, recognize_all, record_failures
from mixtral_run.fleet.explain.known_failures import KNOWN_FAILURES

# Messages that programs print.
SEEN = {
    "host-key": "WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!",
    "jump-host-key": "The jump host bastion before gpu-01 has another host key than ssh knows: it was reimaged, or",
    "ssh-key": "ubuntu@10.0.0.1: Permission denied (publickey).",
    "sudo": "Missing sudo password",
    "requiretty": "sudo: sorry, you must have a tty to run sudo",
    "unreachable": "ssh: connect to host gpu-01 port 22: No route to host",
    "apt-lock": "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 1234 (unattended-upgr)",
    "apt-signed-by": "E: Conflicting values set for option Signed-By regarding source https://download.docker.com/",
    "driver-mismatch": "Failed to initialize NVML: Driver/library version mismatch",
    "fabric-manager": "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
    "nvml-unknown": "Failed to initialize NVML: Unknown Error",
    "no-gpu-runtime": 'could not select device driver "" with capabilities: [[gpu]].',
    "module-rejected": "modprobe: ERROR: could not insert 'nvidia': Key was rejected by service",
    "no-driver": "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
    "cuda-memory": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0",
    "host-memory": "rank 3: killed (SIGKILL), which the kernel does when memory runs out: see dmesg",
    "shared-memory": "RuntimeError: DataLoader worker (pid 123) is killed by signal: Bus error. shared memory (shm)",
    "nccl-timeout": "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE)",
    "nccl-error": "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1331, ncclSystemError",
    "gated-model": "huggingface_hub.errors.GatedRepoError: 401 Client Error.",
    "hub-unreachable": "ConnectionError: HTTPSConnectionPool(host='huggingface.co', port=443): Max retries exceeded",
    "pull-limit": "toomanyrequests: You have reached your unauthenticated pull rate limit.",
    "disk-full": "OSError: [Errno 28] No space left on device",
    "mount-permission": "PermissionError: [Errno 13] Permission denied: '/checkpoints/x'",
    "vault-password": "[ERROR]: Attempting to decrypt but no vault secrets found.",
    "docker-permission": "permission denied while trying to connect to the Docker daemon socket at unix:///run/x",
    "engine-down": "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
    "no-image": "Unable to find image 'mixtral-run:local' locally",
    "other-kit": "✗ Some settings are wrong.\n  - unknown setting 'attention_precision'",
    "swap-holes": "swapon: /swapfile: swapon failed: Invalid argument",
    "no-python": "/bin/sh: 1: /usr/bin/python3: not found",
    "clock": "E: Release file for http://deb.debian.org/debian/dists/bookworm/InRelease is not valid yet",
    "proxy-certificate": "SSLError: certificate verify failed: self-signed certificate in certificate chain",
    "data-format": "Some training data cannot be used.",
    "data-encoding": "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    "data-empty": "The training data contain no example.",
    "data-too-long": "3 of 8 examples are longer than --seq-length 512 before their response begins.",
    "token-ids": "IndexError: index out of range in self",
    "batch-size": "--global-batch-size: expected a multiple of 8 (--micro-batch-size 1 × 8 data-parallel processes)",
    "loss-nan": "iteration 3/10 | consumed samples: 24 | lm loss: nan | grad norm: nan",
    "xid": "NVRM: Xid (PCI:0000:3b:00): 999, pid=1234, name=python, something new",
    "sxid": "nvidia-nvswitch0: SXid (PCI:0000:05:00.0): 20034, Fatal, Link 63 LTSSM Fault Up",
    "xid-reboot": "NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus.",
    "xid-reset": "NVRM: Xid (PCI:0000:18:00): 119, pid=4242, name=python, Timeout after 6s of waiting for RPC response",
    "xid-memory": "NVRM: Xid (PCI:0000:18:00): 48, pid=4242, name=python, An uncorrectable double bit error",
    "xid-nvlink": "NVRM: Xid (PCI:0000:18:00): 74, pid=4242, NVLink: fatal error detected on link 3",
    "xid-fabric-manager": "NVRM: Xid (PCI:0000:18:00): 45, pid=4242, name=python, Ch 00000008",
    "xid-power": "NVRM: Xid (PCI:0000:18:00): 54, Auxiliary power is not connected",
    "xid-recovery": "NVRM: Xid (PCI:0000:18:00): 154, GPU recovery action changed from 0x0 (None)",
    "xid-support": "NVRM: Xid (PCI:0000:18:00): 157, pid=4242",
    "xid-program": "NVRM: Xid (PCI:0000:18:00): 31, pid=4242, name=python, Ch 00000008, intr 00000000. MMU Fault",
    "xid-follow": "NVRM: Xid (PCI:0000:18:00): 63, Row Remapper: New row marked for remapping, reset gpu to activate.",
}

# The actions of NVIDIA's catalog, as its rows are written there.
CATALOG = """
xid-follow: 37 38 43 44 63 66 67 92 93 121 137 141 152 153 160 161
xid-program: 8 11 13 25 31 32 39 40 41 60 68 69 70 71 72 94
xid-reset: 46 62 64 95 109 110 119 120 136 140 143 155 156 158
xid-reboot: 79
xid-power: 54
xid-fabric-manager: 45
xid-memory: 48
xid-nvlink: 74 144 145 146 147 148 149 150
xid-recovery: 154
xid-support: 157
xid: 1 12 61 80 171 172 1540
"""

# Output of jobs and plays around each failure.
LOGS = sorted(Path(__file__).with_name("logs").glob("*/*.txt"))


@pytest.mark.parametrize(("name", "text"), SEEN.items())
def test_a_real_message_is_recognized(name: str, text: str) -> None:
    known = recognize(f"some line before\n{text}\nsome line after")
    assert known is not None
    assert known.name == name


@pytest.mark.parametrize("log", LOGS, ids=lambda log: f"{log.parent.name}-{log.stem}")
def test_a_failure_is_recognized_in_what_else_is_printed_around_it(log: Path) -> None:
    known = recognize(log.read_text())
    assert known is not None
    assert known.name == log.parent.name


@pytest.mark.parametrize("row", CATALOG.split("\n")[1:-1], ids=lambda row: row.split(":")[0])
def test_every_xid_has_the_action_of_the_catalog(row: str) -> None:
    name, _, numbers = row.partition(": ")
    for number in numbers.split():
        forms = (
            f"[ 12.3] NVRM: Xid (PCI:0000:3b:00): {number}, pid=1, name=python",
            f"NVRM: Xid (0000:3b:00.0): {number}, more",
            f"Xid {number} on GPU 5",
            f"2 Xid errors: NVRM: Xid (PCI:0000:3b:00 GPU-I:05): {number}, pid='<unknown>'",
        )
        for text in forms:
            assert [known.name for known in recognize_all(text)] == [name], text
        assert find(f"xid {number}")[0].name == name


def test_every_failure_that_the_guide_names_has_a_log() -> None:
    assert {log.parent.name for log in LOGS} >= {
        "host-memory", "nccl-timeout", "hub-unreachable", "gated-model", "shared-memory", "mount-permission",
        "nvml-unknown", "driver-mismatch", "fabric-manager", "apt-lock", "host-key",
    }  # fmt: skip


def test_every_known_failure_has_a_message_here_and_an_answer() -> None:
    assert {failure.name for failure in KNOWN_FAILURES} == set(SEEN)
    for failure in KNOWN_FAILURES:
        assert failure.cause.endswith(".")
        assert failure.commands


@pytest.mark.parametrize("text", ["", "iteration 10/10 | loss 1.2", "all went well", "Saved to /checkpoints/a"])
def test_an_ordinary_line_is_none_of_them(text: str) -> None:
    assert recognize(text) is None


@pytest.mark.parametrize(
    ("words", "name"),
    [
        # The issues of the hand-written guide, by their headings.
        ("Out of Memory During Conversion", "host-memory"),
        ("NCCL Timeout Errors", "nccl-timeout"),
        ("HuggingFace Download Issues", "hub-unreachable"),
        ("Shared Memory Errors", "shared-memory"),
        ("Permission Denied on Mounted Volumes", "mount-permission"),
        ("Permission denied errors", "mount-permission"),
        ("permissions on mounts", "mount-permission"), ("conversion killed", "host-memory"),
        ("my jsonl data", "data-format"), ("loss is nan", "loss-nan"), ("vocabulary", "token-ids"),
        ("nccl timeout", "nccl-timeout"), ("shm", "shared-memory"),
        ("gated model 401", "gated-model"), ("802", "fabric-manager"),
        ("out of memory while converting", "host-memory"), ("reimaged", "host-key"), ("apt-lock", "apt-lock"),
    ],
)  # fmt: skip
def test_words_find_it(words: str, name: str) -> None:
    assert find(words)[0].name == name


def test_a_recorded_failure_is_explained_by_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    record_failures({"gpu-01": SEEN["apt-lock"], "gpu-02": "something new"})
    assert "unattended-upgrades" in explain("gpu-01")
    assert "not among the known" in explain("gpu-02")
    assert "gpu-01" in explain("")
    with pytest.raises(ConfigError):
        explain("zzz qqq")


def test_the_time_for_a_hostile_log_grows_with_its_length_alone() -> None:
    """CPU seconds, which other work on the machine does not change. A pattern that looks back would take 16 times as
    long for four times the text.
    """

    def seconds(length: int) -> float:
        began = time.process_time()
        assert recognize("unable to lock " * length) is None
        return time.process_time() - began

    assert seconds(40_000) < 8 * min(seconds(10_000) for _ in range(3))


def test_a_locked_administration_directory_is_recognized() -> None:
    failure = recognize("E: Unable to lock the administration directory (/var/lib/dpkg/), are you root?")
    assert failure is not None and failure.name == "apt-lock"

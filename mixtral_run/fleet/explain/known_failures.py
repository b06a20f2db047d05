"""The failures that others met before, as data: how each looks in output, why it happens, and what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class KnownFailure:
    """One way for things to go wrong."""

    name: str
    """A short handle: `mixtral-run explain NAME`."""
    title: str
    pattern: str
    """Regular expression over output; case does not matter."""
    cause: str
    commands: tuple[str, ...]
    words: tuple[str, ...] = ()
    """What a person may call it."""

    def commands_for(self, host: str) -> tuple[str, ...]:
        """The commands with a host's name in them."""
        return tuple(re.sub(r"\bHOST\b", lambda _: host, command) for command in self.commands)


KNOWN_FAILURES: tuple[KnownFailure, ...] = (
    KnownFailure(
        "host-key",
        "The host's SSH key has changed",
        r"host identification has changed|host key .{0,80}has changed|host key verification failed|shows another host key",
        "The host was reimaged, so it has a new key; or somebody sits between you and the host.",
        ("mixtral-run bootstrap --accept-new-host-key HOST HOST    # only if you know that it was reimaged",),
        ("ssh", "known_hosts", "fingerprint", "reimaged", "changed"),
    ),
    KnownFailure(
        "jump-host-key",
        "The SSH key of a jump host has changed, or is not known",
        r"jump host .{0,160}(another host key than|is not the one that ssh knows)",
        "The kit looks after the keys of a fleet's hosts; those of jump hosts are ssh's own: ~/.ssh/known_hosts, as a rule.",
        ("ssh-keygen -R JUMP_HOST    # only if you know that it was reimaged", "ssh HOST    # asks for the new key"),
        ("bastion", "proxyjump", "jump"),
    ),
    KnownFailure(
        "ssh-key",
        "The host refuses the SSH key",
        r"permission denied \((publickey|gssapi|keyboard|password)|refuses the key\.|too many authentication failures",
        "No key that this machine offers is in the host's authorized_keys, or the user name is another.",
        ("mixtral-run bootstrap --ask-pass USER@HOST    # puts your key there, with the password once",),
        ("ssh", "login", "publickey", "authorized_keys"),
    ),
    KnownFailure(
        "sudo",
        "The user may not become root",
        r"missing sudo password|incorrect sudo password|a password is required|is not in the sudoers|become password",
        "Setting a host up needs root: the user must be allowed to use sudo, here with its password.",
        ("mixtral-run bootstrap --ask-become-pass USER@HOST",),
        ("become", "root", "password"),
    ),
    KnownFailure(
        "unreachable",
        "The host does not answer",
        r"connection timed out|no route to host|connection refused|does not answer\.|could not resolve hostname|cannot be reached"
        r"|refuses the connection",
        "The host is down, its network or firewall is in the way, or the port is another.",
        ("ssh -v HOST", "mixtral-run status HOST"),
        ("ssh", "network", "down", "timeout"),
    ),
    KnownFailure(
        "apt-lock",
        "Another program holds apt's lock",
        r"could not get lock /var/lib/(dpkg|apt)|unable to acquire the dpkg frontend lock|unable to lock .*administration directory"
        r"|failed to lock apt",
        "On a fresh host unattended-upgrades runs for some minutes after boot and holds the package database.",
        ("mixtral-run bootstrap --retry    # it waits for the lock; docker_apt_lock_timeout_seconds says how long",),
        ("dpkg", "apt", "unattended-upgrades"),
    ),
    KnownFailure(
        "apt-signed-by",
        "Two source files name one apt repository with different keys",
        r"conflicting values set for option signed-by",
        "An older .list or .sources file names the same repository.",
        ("mixtral-run bootstrap HOST --tags docker    # removes the older files",),
        ("apt", "sources", "keyring"),
    ),
    KnownFailure(
        "driver-mismatch",
        "The driver's kernel module and library differ",
        r"driver/library version mismatch|kernel module \S+, library \S+",
        "An unattended upgrade replaced the library while the old kernel module stayed loaded.",
        ("ssh HOST sudo reboot", "ssh HOST sudo apt-mark hold 'nvidia-driver-*'    # so that it does not happen again"),
        ("nvidia", "nvml", "upgrade"),
    ),
    KnownFailure(
        "fabric-manager",
        "CUDA fails with error 802: the fabric manager is missing or of another version",
        r"system not yet initialized|cuda(?: ?error:? ?|_error_)\D{0,24}802|error 802|nvidia-fabricmanager",
        "Hosts with NVSwitches need nvidia-fabricmanager of exactly the driver's version, running.",
        (
            "ssh HOST 'sudo apt-get install nvidia-fabricmanager-550=$(nvidia-smi --query-gpu=driver_version "
            "--format=csv,noheader -i 0)-1'    # 550: the driver's branch; from 580 on, in NVIDIA's repository, without it",
            "ssh HOST sudo systemctl enable --now nvidia-fabricmanager",
        ),
        ("nvswitch", "802", "cuinit", "fabric"),
    ),
    KnownFailure(
        "nvml-unknown",
        "GPUs vanish from a running container: NVML unknown error",
        r"failed to initialize nvml: ?unknown error",
        "systemctl daemon-reload takes the devices from containers that got them by the legacy hook; CDI does not lose them.",
        (
            "mixtral-run bootstrap HOST --tags nvidia_container_toolkit",
            "mixtral-run stop JOB, then start the job again",
        ),
        ("nvidia", "nvml", "cdi", "container"),
    ),
    KnownFailure(
        "no-gpu-runtime",
        "The engine cannot hand GPUs to containers",
        r"could not select device driver .{0,12}with capabilities: \[\[gpu|unknown or invalid runtime name:? nvidia"
        r"|unresolvable cdi devices|unknown runtime specified nvidia",
        "The NVIDIA container toolkit is not set up for this engine, or an engine upgrade dropped the runtime.",
        ("mixtral-run bootstrap HOST --tags nvidia_container_toolkit",),
        ("runtime", "gpus", "toolkit", "docker"),
    ),
    KnownFailure(
        "no-driver",
        "No NVIDIA driver answers",
        r"nvidia-smi has failed because it couldn't communicate|no nvidia driver|no devices were found|nvidia-smi: (command )?not found",
        "The driver is not installed, or its module is not loaded (a new kernel without a rebuilt module).",
        ("ssh HOST sudo ubuntu-drivers install --gpgpu, then reboot", "ssh HOST dkms status"),
        ("nvidia-smi", "driver", "module"),
    ),
    KnownFailure(
        "cuda-memory",
        "A GPU's memory is full",
        r"cuda out of memory|cuda error: out of memory|outofmemoryerror",
        "The layout keeps too much on one GPU: weights, activations or another job's.",
        (
            "mixtral-run plan --gpus 8 --gpu-memory 80    # what fits; finetune --layout auto takes the best of it",
            "mixtral-run finetune … --recompute-activations --micro-batch-size 1",
            "mixtral-run finetune … --expert-model-parallel-size 8 --tensor-model-parallel-size 1, or a shorter --seq-length",
            "mixtral-run jobs    # is another job on the host?",
        ),
        ("oom", "memory", "gpu"),
    ),
    KnownFailure(
        "host-memory",
        "The host's memory is full (a process was killed)",
        r"killed \(sigkill\)|out of memory: kill(ed)? process|oom-kill|exit code -9|exitcode *: -9|signal 9 \(sigkill\)|memoryerror|cannot allocate memory",
        "Conversion and loading need host memory; the kernel kills the largest process when RAM and swap are full.",
        (
            "mixtral-run bootstrap HOST --tags swap    # adds swap",
            "ssh HOST 'dmesg | grep -i oom'; mixtral-run status HOST",
        ),
        ("oom", "ram", "memory", "convert", "converting", "sigkill", "swap"),
    ),
    KnownFailure(
        "shared-memory",
        "Shared memory is too small",
        r"no space left on device.{0,80}/dev/shm|/dev/shm.{0,80}no space left|bus error|unable to (open|allocate) shared memory"
        r"|insufficient shared memory|posix_fallocate failed|error while creating shared memory segment",
        "Docker gives a container 64 MB of /dev/shm unless told otherwise; NCCL and data loaders need gigabytes.",
        (
            "mixtral-run finetune … --on HOST --shm-size 64g",
            "docker run --shm-size=32g …    # where you start containers yourself",
        ),
        ("shm", "bus", "sigbus", "nccl"),
    ),
    KnownFailure(
        "nccl-timeout",
        "A collective operation timed out",
        r"watchdog caught collective operation timeout|nccl.{0,60}time(d)? ?out|processgroupnccl.{0,80}timeout"
        r"|timed out waiting .{0,40}store|client socket has (timed out|failed to connect)|connect\(\) timed out.{0,80}store|rendezvous.{0,60}(time(d)? ?out|closed)",
        "One process died or is much slower than the others, or the network between them does not carry NCCL.",
        (
            "mixtral-run logs JOB    # the first process that failed says why",
            "mixtral-run finetune … --nccl-debug INFO --nccl-timeout 3600",
            "set NCCL_SOCKET_IFNAME to the interface that connects the hosts: --env NCCL_SOCKET_IFNAME=eth0",
        ),
        ("nccl", "timeout", "hang", "rendezvous"),
    ),
    KnownFailure(
        "nccl-error",
        "NCCL failed",
        r"nccl error|ncclsystemerror|ncclunhandledcudaerror|ncclinternalerror|ncclremoteerror",
        "GPUs cannot talk to each other: peer access, the fabric manager, shared memory or the network.",
        (
            "mixtral-run finetune … --nccl-debug INFO",
            "mixtral-run status HOST",
            "ssh HOST nvidia-smi topo -m",
            "--env NCCL_P2P_DISABLE=1    # GPUs do not read from each other then, NCCL's and the kit's exchanges alike",
        ),
        ("nccl", "p2p", "nvlink"),
    ),
    KnownFailure(
        "gated-model",
        "The hub refuses the model: gated, or no token",
        r"401 client error|403 client error|gatedrepoerror|access to model .{0,80}is restricted|you must (have access|be authenticated)"
        r"|cannot access gated repo|invalid username or password\..{0,20}hugging",
        "Mixtral's terms must be accepted once on its page, and the token must reach the host.",
        (
            "accept the terms on https://huggingface.co/mistralai/Mixtral-8x7B-v0.1",
            "mixtral-run bootstrap HOST --tags hf_cache --hf-token-file FILE",
        ),
        ("huggingface", "token", "401", "gated", "download", "hf"),
    ),
    KnownFailure(
        "hub-unreachable",
        "The model cannot be downloaded",
        r"(connection|max retries|name resolution|timed? ?out|localentrynotfounderror).{0,200}huggingface|huggingface\.co.{0,120}"
        r"(timed? ?out|max retries|failed to resolve)|we couldn't connect to .{0,40}huggingface|error happened while trying to locate the files? on the hub",
        "The host does not reach the hub: a proxy, a firewall, or no internet at all.",
        (
            "set hf_cache_proxy or hf_cache_endpoint in group_vars, then: mixtral-run bootstrap HOST --tags hf_cache",
            "copy the model to the host and name its folder: --hf-model-path /data/hf/Mixtral-8x7B-v0.1",
        ),
        ("huggingface", "download", "proxy", "hf"),
    ),
    KnownFailure(
        "pull-limit",
        "The registry limits anonymous pulls",
        r"toomanyrequests|you have reached your (unauthenticated )?pull rate limit|429 too many requests",
        "Docker Hub gives 100 anonymous pulls in six hours to one address.",
        ("set docker_registry_mirrors, or image_base to an image of your own registry, in group_vars",),
        ("docker hub", "429", "registry", "pull"),
    ),
    KnownFailure(
        "disk-full",
        "A disk is full",
        r"no space left on device|disk quota exceeded|enospc",
        "The HF weights take 94 GB, each converted checkpoint as much again, and images some 20 GB.",
        (
            "mixtral-run status HOST    # free space by folder",
            "ssh HOST docker system df; ssh HOST docker image prune",
            "put images on a larger disk: docker_data_root and docker_containerd_root in group_vars",
        ),
        ("disk", "space", "full"),
    ),
    KnownFailure(
        "mount-permission",
        "The job may not write into a mounted folder",
        r"permission denied: '?/|permissionerror|read-only file system",
        "The container runs with your uid; the folder on the host belongs to somebody else, or is mounted read-only.",
        ("ssh HOST 'sudo chown -R \"$(id -u):$(id -g)\" FOLDER'",),
        ("permission", "mount", "volume", "chown"),
    ),
    KnownFailure(
        "docker-permission",
        "The user may not talk to the engine",
        r"permission denied while trying to connect to the docker (daemon|api)|got permission denied .{0,60}docker\.sock",
        "The user is not in the group docker, or was added after it logged in.",
        (
            'mixtral-run bootstrap HOST --tags docker --ask-become-pass --extra-vars \'{"docker_users": ["USER"]}\'',
            "log in again",
        ),
        ("docker", "socket", "group"),
    ),
    KnownFailure(
        "engine-down",
        "The Docker engine does not answer",
        r"cannot connect to the docker daemon|failed to connect to the docker api|is the docker daemon running|docker: (command )?not found|docker engine does not",
        "The engine is not installed or not running, often because of a fault in /etc/docker/daemon.json.",
        ("mixtral-run bootstrap HOST --tags docker", "ssh HOST sudo journalctl -u docker -n 30"),
        ("docker", "daemon", "engine"),
    ),
    KnownFailure(
        "no-image",
        "The image is not on the host",
        r"unable to find image|no such image|pull access denied for mixtral-run|there is no image of the kit",
        "The kit's image is built on each host by bootstrap.",
        ("mixtral-run bootstrap HOST --tags image",),
        ("image", "build"),
    ),
    KnownFailure(
        "swap-holes",
        "The swap file cannot be switched on",
        r"swapon.{0,80}(invalid argument|has holes|skipping)",
        "btrfs, ZFS, old XFS and overlay filesystems do not carry a swap file made by fallocate, or none at all.",
        ("put it on an ext4 disk: swap_path in group_vars, then mixtral-run bootstrap HOST --tags swap",),
        ("swap", "fallocate", "btrfs", "overlay"),
    ),
    KnownFailure(
        "no-python",
        "The host has no Python",
        r"/usr/bin/python3?: (not found|no such file)|python3?: command not found|no python interpreters found",
        "Ansible's modules need Python 3.8 or newer; minimal images come without.",
        ("mixtral-run bootstrap HOST --tags preflight    # installs it",),
        ("python", "interpreter", "minimal"),
    ),
    KnownFailure(
        "clock",
        "The clock is wrong",
        r"release file .{0,80}is not valid yet|certificate is not yet valid|certificate has expired",
        "Signatures and certificates are refused under a wrong clock.",
        ("ssh HOST sudo timedatectl set-ntp true",),
        ("ntp", "time", "certificate"),
    ),
    KnownFailure(
        "proxy-certificate",
        "A certificate is not trusted",
        r"certificate verify failed|unable to get local issuer certificate|self[- ]signed certificate",
        "A company proxy signs traffic with a certificate authority that the host does not know.",
        ("name its bundle in group_vars (…_ca_bundle), then: mixtral-run bootstrap HOST",),
        ("tls", "ca", "proxy", "certificate"),
    ),
    KnownFailure(
        "xid",
        "A GPU reports a hardware fault (Xid)",
        r"nvrm: xid|xid \d+|gpu has fallen off the bus|uncorrectable ecc",
        "Xid 79 (fallen off the bus), 48, 63, 64, 94 and 95 (memory) point to hardware; 13 and 31 more often to a program.",
        (
            "ssh HOST 'sudo dmesg | grep -i xid'",
            "ssh HOST sudo nvidia-smi -r, or reboot; if it comes back, ask for a new GPU",
        ),
        ("ecc", "hardware", "gpu"),
    ),
)

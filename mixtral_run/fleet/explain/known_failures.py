"""Known failures as data: their pattern in output, their cause, and the commands that help."""

from __future__ import annotations

from mixtral_run.fleet.explain.data_failures import DATA_FAILURES
from mixtral_run.fleet.explain.known_failure import KnownFailure
from mixtral_run.fleet.explain.xid_failures import XID_FAILURES

KNOWN_FAILURES: tuple[KnownFailure, ...] = (
    KnownFailure(
        "host-key",
        "The host's SSH key has changed",
        r"host identification has changed|host key .{0,80}has changed|host key verification failed|shows another host key",
        "The host was reimaged and has a new key, or somebody intercepts the connection.",
        ("mixtral-run bootstrap --accept-new-host-key HOST HOST    # only if you know that the host was reimaged",),
        ("ssh", "known_hosts", "fingerprint", "reimaged", "changed"),
    ),
    KnownFailure(
        "jump-host-key",
        "The SSH key of a jump host has changed or is unknown",
        r"jump host .{0,160}(another host key than|is not the one that ssh knows)",
        "The kit records the keys of the fleet's hosts only. ssh checks the keys of jump hosts, usually in ~/.ssh/known_hosts.",
        (
            "ssh-keygen -R JUMP_HOST    # only if you know that the jump host was reimaged",
            "ssh HOST    # asks whether to accept the new key",
        ),
        ("bastion", "proxyjump", "jump"),
    ),
    KnownFailure(
        "ssh-key",
        "The host refuses the SSH key",
        r"permission denied \((publickey|gssapi|keyboard|password)|refuses the key\.|too many authentication failures",
        "The authorized_keys of the host contain no key of this machine, or the user name is wrong.",
        ("mixtral-run bootstrap --ask-pass USER@HOST    # installs your key; asks once for the password",),
        ("ssh", "login", "publickey", "authorized_keys"),
    ),
    KnownFailure(
        "sudo",
        "The user cannot become root",
        r"missing sudo password|incorrect sudo password|a password is required|is not in the sudoers|become password",
        "The setup of a host needs root: the user must be allowed to use sudo. Here sudo asks for a password.",
        ("mixtral-run bootstrap --ask-become-pass USER@HOST",),
        ("become", "root", "password"),
    ),
    KnownFailure(
        "requiretty",
        "sudo asks for a terminal",
        r"you must have a tty to run sudo|no tty present",
        "The setting `Defaults requiretty` of sudo refuses commands without a terminal, and Ansible has none.",
        (
            "ssh -t HOST sudo visudo    # add the line: Defaults:USER !requiretty",
            "mixtral-run bootstrap root@HOST    # without sudo, where root may log in",
        ),
        ("sudo", "tty", "terminal"),
    ),
    KnownFailure(
        "unreachable",
        "The host does not answer",
        r"connection timed out|no route to host|connection refused|does not answer\.|could not resolve hostname|cannot be reached"
        r"|refuses the connection",
        "The host is down, the network or a firewall blocks the connection, or the port is wrong.",
        ("ssh -v HOST", "mixtral-run status HOST"),
        ("ssh", "network", "down", "timeout"),
    ),
    KnownFailure(
        "apt-lock",
        "Another program holds apt's lock",
        r"could not get lock /var/lib/(dpkg|apt)|unable to acquire the dpkg frontend lock|unable to lock .{0,80}administration directory"
        r"|failed to lock apt",
        "On a new host, unattended-upgrades runs for some minutes after boot and locks the package database.",
        ("mixtral-run bootstrap --retry    # waits for the lock up to docker_apt_lock_timeout_seconds",),
        ("dpkg", "apt", "unattended-upgrades"),
    ),
    KnownFailure(
        "apt-signed-by",
        "Two apt source files name the same repository with different keys",
        r"conflicting values set for option signed-by",
        "An older .list or .sources file names the same repository.",
        ("mixtral-run bootstrap HOST --tags docker    # removes the older files",),
        ("apt", "sources", "keyring"),
    ),
    KnownFailure(
        "driver-mismatch",
        "The versions of the driver's kernel module and library differ",
        r"driver/library version mismatch|kernel module \S+, library \S+",
        "An unattended upgrade replaced the library while the old kernel module stayed loaded.",
        (
            "ssh HOST sudo reboot",
            "ssh HOST \"dpkg --get-selections '*nvidia*' 'linux-image-*' 'linux-headers-*' 'linux-modules-*' 'linux-generic*'"
            ' | grep -v deinstall | cut -f1 | xargs sudo apt-mark hold"    # prevents it: driver, libraries, modules and kernel stay together',
        ),
        ("nvidia", "nvml", "upgrade"),
    ),
    KnownFailure(
        "fabric-manager",
        "CUDA fails with error 802: the fabric manager is missing or has another version",
        r"system not yet initialized|cuda(?: ?error:? ?|_error_)\D{0,24}802|error 802|nvidia-fabricmanager",
        "Hosts with NVSwitches need a running nvidia-fabricmanager of exactly the driver's version.",
        (
            "ssh HOST 'sudo apt-get install \"nvidia-fabricmanager=$(nvidia-smi --query-gpu=driver_version "
            "--format=csv,noheader -i 0)-*\"'    # below 580, and in Ubuntu's archive: nvidia-fabricmanager-BRANCH=…",
            "ssh HOST sudo systemctl enable --now nvidia-fabricmanager",
        ),
        ("nvswitch", "802", "cuinit", "fabric"),
    ),
    KnownFailure(
        "nvml-unknown",
        "GPUs vanish from a running container: NVML unknown error",
        r"failed to initialize nvml: ?unknown error",
        "systemctl daemon-reload removes the devices of containers that use the legacy hook. Containers with CDI keep them.",
        (
            "mixtral-run bootstrap HOST --tags nvidia_container_toolkit",
            "mixtral-run stop JOB, then start the job again",
        ),
        ("nvidia", "nvml", "cdi", "container"),
    ),
    KnownFailure(
        "no-gpu-runtime",
        "The engine cannot give GPUs to containers",
        r"could not select device driver .{0,12}with capabilities: \[\[gpu|unknown or invalid runtime name:? nvidia"
        r"|unresolvable cdi devices|unknown runtime specified nvidia",
        "The NVIDIA container toolkit is not set up for this engine, or an engine upgrade removed the runtime.",
        ("mixtral-run bootstrap HOST --tags nvidia_container_toolkit",),
        ("runtime", "gpus", "toolkit", "docker"),
    ),
    KnownFailure(
        "no-driver",
        "No NVIDIA driver answers",
        r"nvidia-smi has failed because it couldn't communicate|no nvidia driver|no devices were found|nvidia-smi: (command )?not found",
        "The driver is not installed, or its module is not loaded (for example after a kernel upgrade without a rebuild).",
        (
            "mixtral-run bootstrap HOST --tags nvidia_driver    # installs and loads it; with a driver of somebody else, add "
            "-e nvidia_driver_branch=580",
            "ssh HOST 'dkms status; modinfo -F version nvidia; modinfo -k NEWEST_KERNEL -F version nvidia'",
        ),
        ("nvidia-smi", "driver", "module"),
    ),
    KnownFailure(
        "module-rejected",
        "Secure Boot refuses the driver's kernel module",
        r"could not insert 'nvidia\w*': (key was rejected by service|required key not available)",
        "The module was built on the host, and the firmware does not trust its signature.",
        (
            "mixtral-run bootstrap HOST --tags nvidia_driver -e nvidia_driver_source=ubuntu    # Ubuntu: signed modules",
            "switch Secure Boot off in the firmware, or enroll the key of DKMS at the console with `mokutil --import`",
        ),
        ("secure boot", "mokutil", "dkms", "signature"),
    ),
    KnownFailure(
        "cuda-memory",
        "A GPU's memory is full",
        r"cuda out of memory|cuda error: out of memory|outofmemoryerror",
        "The layout needs too much memory on one GPU for weights and activations, or another job uses the GPU.",
        (
            "mixtral-run plan --gpus 8 --gpu h100    # lists layouts that fit; finetune uses the best by default",
            "mixtral-run finetune … --recompute-activations --micro-batch-size 1",
            "mixtral-run finetune … --expert-model-parallel-size 8 --tensor-model-parallel-size 1, or a shorter --seq-length",
            "mixtral-run jobs    # shows whether another job runs on the host",
        ),
        ("oom", "memory", "gpu"),
    ),
    KnownFailure(
        "host-memory",
        "The host's memory is full (a process was killed)",
        r"killed \(sigkill\)|out of memory: kill(ed)? process|oom-kill|exit code -9|exitcode *: -9|signal 9 \(sigkill\)|memoryerror|cannot allocate memory",
        "Conversion and loading need host memory. The kernel kills the largest process when RAM and swap are full.",
        (
            "mixtral-run bootstrap HOST --tags swap    # adds swap",
            "ssh HOST 'dmesg | grep -i oom'; mixtral-run status HOST",
        ),
        ("oom", "ram", "memory", "convert", "converting", "conversion", "killed", "sigkill", "swap"),
    ),
    KnownFailure(
        "shared-memory",
        "Shared memory is too small",
        r"no space left on device.{0,80}/dev/shm|/dev/shm.{0,80}no space left|bus error|unable to (open|allocate) shared memory"
        r"|insufficient shared memory|posix_fallocate failed|error while creating shared memory segment",
        "Docker gives a container 64 MB of /dev/shm by default. NCCL and data loaders need gigabytes.",
        (
            "mixtral-run finetune … --on HOST --shm-size 64g",
            "docker run --shm-size=32g …    # if you start containers yourself",
        ),
        ("shm", "bus", "sigbus", "nccl"),
    ),
    KnownFailure(
        "nccl-timeout",
        "A collective operation timed out",
        r"watchdog caught collective operation timeout|nccl.{0,60}time(d)? ?out|processgroupnccl.{0,80}timeout"
        r"|timed out waiting .{0,40}store|client socket has (timed out|failed to connect)|connect\(\) timed out.{0,80}store|rendezvous.{0,60}(time(d)? ?out|closed)",
        "One process died or is much slower than the others, or the network between the hosts blocks NCCL.",
        (
            "mixtral-run logs JOB    # the first process that failed shows the reason",
            "mixtral-run finetune … --nccl-debug INFO --nccl-timeout 3600",
            "set NCCL_SOCKET_IFNAME to the interface that connects the hosts: --env NCCL_SOCKET_IFNAME=eth0",
        ),
        ("nccl", "timeout", "hang", "rendezvous"),
    ),
    KnownFailure(
        "nccl-error",
        "NCCL failed",
        r"nccl error|ncclsystemerror|ncclunhandledcudaerror|ncclinternalerror|ncclremoteerror",
        "GPUs cannot exchange data. The cause is peer access, the fabric manager, shared memory or the network.",
        (
            "mixtral-run finetune … --nccl-debug INFO",
            "mixtral-run status HOST",
            "ssh HOST nvidia-smi topo -m",
            "--env NCCL_P2P_DISABLE=1    # disables peer access between GPUs, for NCCL and for the kit",
        ),
        ("nccl", "p2p", "nvlink"),
    ),
    KnownFailure(
        "gated-model",
        "The hub refuses access to the model: it is gated, or the token is missing",
        r"401 client error|403 client error|gatedrepoerror|access to model .{0,80}is restricted|you must (have access|be authenticated)"
        r"|cannot access gated repo|invalid username or password\..{0,20}hugging",
        "The terms of Mixtral must be accepted once on its page, and the host needs the token.",
        (
            "accept the terms on https://huggingface.co/mistralai/Mixtral-8x7B-v0.1",
            "mixtral-run bootstrap HOST --tags hf_cache --hf-token-file FILE",
        ),
        ("huggingface", "token", "401", "gated", "hf"),
    ),
    KnownFailure(
        "hub-unreachable",
        "The model cannot be downloaded",
        r"(connection|max retries|name resolution|timed? ?out|localentrynotfounderror).{0,200}huggingface|huggingface\.co.{0,120}"
        r"(timed? ?out|max retries|failed to resolve)|we couldn't connect to .{0,40}huggingface|error happened while trying to locate the files? on the hub",
        "The host cannot reach the hub: it needs a proxy, a firewall blocks the connection, or it has no internet access.",
        (
            "set hf_cache_proxy or hf_cache_endpoint in group_vars, then: mixtral-run bootstrap HOST --tags hf_cache",
            "copy the model to the host and name its folder: --hf-model-path /data/hf/Mixtral-8x7B-v0.1",
        ),
        ("huggingface", "download", "downloading", "proxy", "hf"),
    ),
    KnownFailure(
        "pull-limit",
        "The registry limits anonymous pulls",
        r"toomanyrequests|you have reached your (unauthenticated )?pull rate limit|429 too many requests",
        "Docker Hub allows 100 anonymous pulls in six hours per address.",
        ("set docker_registry_mirrors, or image_base to an image of your own registry, in group_vars",),
        ("docker hub", "429", "registry", "pull"),
    ),
    KnownFailure(
        "disk-full",
        "A disk is full",
        r"no space left on device|disk quota exceeded|enospc",
        "The HF weights need 94 GB, each converted checkpoint another 94 GB, and images about 20 GB.",
        (
            "mixtral-run status HOST    # shows free space by folder",
            "ssh HOST docker system df; ssh HOST docker image prune",
            "move images to a larger disk: docker_data_root and docker_containerd_root in group_vars",
        ),
        ("disk", "space", "full"),
    ),
    KnownFailure(
        "mount-permission",
        "The job cannot write to a mounted folder",
        r"permission denied: '?/|permissionerror|read-only file system",
        "The container runs with your uid. The folder on the host belongs to another user or is mounted read-only.",
        ("ssh HOST 'sudo chown -R \"$(id -u):$(id -g)\" FOLDER'",),
        ("permission", "mount", "mounted", "volume", "chown"),
    ),
    KnownFailure(
        "vault-password",
        "Ansible has no password for an encrypted variable",
        r"no vault secrets|vault password file .{0,300} not found|decryption failed \(no vault",
        "A variable of the inventory or of --extra-vars is encrypted with ansible-vault.",
        ("ANSIBLE_VAULT_PASSWORD_FILE=FILE mixtral-run bootstrap HOST",),
        ("vault", "ansible-vault", "encrypted", "decrypt"),
    ),
    KnownFailure(
        "docker-permission",
        "The user may not access the engine",
        r"permission denied while trying to connect to the docker (daemon|api)|got permission denied .{0,60}docker\.sock",
        "The user is not in the group docker, or was added to it after the login.",
        (
            'mixtral-run bootstrap HOST --tags docker --ask-become-pass --extra-vars \'{"docker_add_users": ["USER"]}\'',
            "log in again",
        ),
        ("docker", "socket", "group"),
    ),
    KnownFailure(
        "engine-down",
        "The Docker engine does not answer",
        r"cannot connect to the docker daemon|failed to connect to the docker api|is the docker daemon running|docker: (command )?not found|docker engine does not",
        "The engine is not installed or not running, often because of an error in /etc/docker/daemon.json.",
        ("mixtral-run bootstrap HOST --tags docker", "ssh HOST sudo journalctl -u docker -n 30"),
        ("docker", "daemon", "engine"),
    ),
    KnownFailure(
        "no-image",
        "The image is not on the host",
        r"unable to find image|no such image|pull access denied for mixtral-run|there is no image of the kit",
        "bootstrap builds the kit's image on each host.",
        ("mixtral-run bootstrap HOST --tags image",),
        ("image", "build"),
    ),
    KnownFailure(
        "other-kit",
        "The job does not know one of its settings",
        r"unknown setting '",
        "The image on the host holds an earlier version of the kit than this machine, which cannot do what the setting asks "
        "for; or the setting is misspelled.",
        ("mixtral-run bootstrap HOST --tags image    # then the same command again",),
        ("image", "version", "setting", "unknown"),
    ),
    KnownFailure(
        "swap-holes",
        "The swap file cannot be enabled",
        r"swapon.{0,80}(invalid argument|has holes|skipping)",
        "btrfs, ZFS, old XFS and overlay filesystems do not support swap files made by fallocate, or any swap files.",
        ("move it to an ext4 disk: set swap_path in group_vars, then mixtral-run bootstrap HOST --tags swap",),
        ("swap", "fallocate", "btrfs", "overlay"),
    ),
    KnownFailure(
        "no-python",
        "The host has no Python",
        r"/usr/bin/python3?: (not found|no such file)|python3?: command not found|no python interpreters found",
        "Ansible's modules need Python 3.8 or newer. Minimal images do not contain Python.",
        ("mixtral-run bootstrap HOST --tags preflight    # installs it",),
        ("python", "interpreter", "minimal"),
    ),
    KnownFailure(
        "clock",
        "The clock of the host is wrong",
        r"release file .{0,80}is not valid yet|certificate is not yet valid|certificate has expired",
        "Signatures and certificates are invalid at the time that the clock shows.",
        ("ssh HOST sudo timedatectl set-ntp true",),
        ("ntp", "time", "certificate"),
    ),
    KnownFailure(
        "proxy-certificate",
        "A certificate is not trusted",
        r"certificate verify failed|unable to get local issuer certificate|self[- ]signed certificate",
        "A company proxy signs traffic with a certificate authority that the host does not trust.",
        ("set its CA bundle in group_vars (…_ca_bundle), then: mixtral-run bootstrap HOST",),
        ("tls", "ca", "proxy", "certificate"),
    ),
    *XID_FAILURES,
    *DATA_FAILURES,
)

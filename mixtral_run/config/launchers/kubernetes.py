"""Settings of `--launcher kubernetes`, in the forms that the API accepts. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

from mixtral_run.config.fields import setting
from mixtral_run.config.launchers.base import LauncherConfig

KUBERNETES = "Kubernetes"
"""Section of --help."""
CRDS = ("job", "trainjob")
IMAGE_USER = "1000:1000"
"""User and group of the kit's image."""

_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_NAME = rf"{_LABEL}(\.{_LABEL})*"
_WORD = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_KEY = rf"({_NAME}/)?{_WORD}"
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")


def is_label(text: str) -> bool:
    """Return True for a name as RFC 1123 has it for a label of DNS: at most 63 characters, such as a namespace."""
    return re.fullmatch(_LABEL, text) is not None


def is_name(text: str) -> bool:
    """Return True for the name of an object: labels with dots between them, at most 253 characters."""
    return len(text) <= 253 and re.fullmatch(_NAME, text) is not None


@dataclass(frozen=True)
class Volume:
    """A volume of the pods.

    source: the name of a claim, or an absolute folder of every node. path: where the container has it.
    """

    source: str
    path: str
    read_only: bool = False

    @property
    def is_claim(self) -> bool:
        return not self.source.startswith("/")


def parse_volume(text: str) -> Volume:
    """Parse `pvc/NAME:PATH[:ro]` or `/FOLDER:PATH[:ro]`. Raises ValueError that says what is wrong."""
    source, colon, rest = text.partition(":")
    path, _, mode = rest.partition(":")
    if not colon or mode not in ("", "ro") or rest.endswith(":"):
        raise ValueError(f"expected pvc/NAME:PATH or /FOLDER:PATH, with :ro behind it to only read; found {text!r}")
    if source.startswith("pvc/"):
        source = source.removeprefix("pvc/")
        if not is_name(source):
            raise ValueError(f"expected the name of a PersistentVolumeClaim after pvc/; found {source!r}")
    elif not _is_folder(source):
        raise ValueError(f"expected pvc/NAME, or an absolute folder of the nodes, before the colon; found {source!r}")
    if not _is_folder(path):
        raise ValueError(f"expected an absolute folder of the container after the colon; found {path!r}")
    return Volume(source, path, mode == "ro")


def _is_folder(text: str) -> bool:
    """Return True for an absolute path in its shortest form, apart from the root."""
    path = PurePosixPath(text)
    is_short = str(path) == text and not {"..", "//"} & set(path.parts)
    return is_short and len(path.parts) > 1 and path.is_absolute() and text.isprintable()


@dataclass(frozen=True)
class Toleration:
    """A taint that the pods accept. value "" accepts every value of the key, effect "" every effect."""

    key: str
    value: str = ""
    effect: str = ""


def parse_toleration(text: str) -> Toleration:
    """Parse `KEY[=VALUE][:EFFECT]`, as `kubectl taint` writes it. Raises ValueError that says what is wrong."""
    rest, colon, effect = text.partition(":")
    key, equals, value = rest.partition("=")
    is_right = _is_key(key) and (not equals or re.fullmatch(_WORD, value)) and (not colon or effect in _EFFECTS)
    if not is_right:
        raise ValueError(f"expected KEY[=VALUE][:EFFECT] with one of {', '.join(_EFFECTS)}; found {text!r}")
    return Toleration(key, value, effect)


def parse_selector(text: str) -> tuple[str, str]:
    """Parse `KEY=VALUE` for a label of nodes. Raises ValueError that says what is wrong."""
    key, equals, value = text.partition("=")
    if not equals or not _is_key(key) or (value and not re.fullmatch(_WORD, value)):
        raise ValueError(f"expected KEY=VALUE, the label of a node; found {text!r}")
    return key, value


def _is_key(text: str) -> bool:
    return len(text) <= 317 and re.fullmatch(_KEY, text) is not None


def parse_secret(text: str) -> tuple[str, str]:
    """Parse `NAME[:KEY]`, a key of a Secret; the key `token` by default. Raises ValueError that says what is wrong."""
    name, colon, key = text.partition(":")
    if not is_name(name) or (colon and not re.fullmatch(r"[-._A-Za-z0-9]{1,253}", key)):
        raise ValueError(f"expected NAME[:KEY] of a Secret of the cluster, never a token; found {len(text)} characters")
    return name, key or "token"


@dataclass(frozen=True, kw_only=True)
class KubernetesConfig(LauncherConfig):
    """A job as the API of Kubernetes gets it."""

    crd: str = setting(
        "job",
        help="Kind of object. job: an Indexed Job, with a headless Service if it has several nodes. trainjob: a "
        "TrainJob of Kubeflow Trainer.",
        choices=CRDS,
        section=KUBERNETES,
    )
    volume: tuple[str, ...] = setting(
        (),
        help="Volume of the pods: pvc/NAME:PATH, or /FOLDER:PATH for a folder that each node has; with :ro behind it "
        "to only read. PATH /checkpoints is required, /huggingface is the Hugging Face cache. May be repeated.",
        section=KUBERNETES,
    )
    namespace: str | None = setting(None, help="Namespace. Default: that of kubectl's context.", section=KUBERNETES)
    kube_context: str | None = setting(None, help="Context of kubectl. Default: the current one.", section=KUBERNETES)
    service_account: str | None = setting(None, help="Service account of the pods.", section=KUBERNETES)
    pull_secret: str | None = setting(None, help="Secret for the registry of the image.", section=KUBERNETES)
    token_secret: str | None = setting(
        None,
        help="Secret of the namespace that holds the Hugging Face token, as NAME or NAME:KEY. The token itself is in "
        "no manifest.",
        section=KUBERNETES,
    )
    store_secret: str | None = setting(
        None,
        help="Secret of the namespace that holds the keys of an object store, by the names AWS_ACCESS_KEY_ID, "
        "AWS_SECRET_ACCESS_KEY and, where needed, AWS_SESSION_TOKEN and AWS_ENDPOINT_URL.",
        section=KUBERNETES,
    )
    node_selector: tuple[str, ...] = setting(
        (), help="Label that the nodes must have, KEY=VALUE. May be repeated.", section=KUBERNETES
    )
    toleration: tuple[str, ...] = setting(
        (), help="Taint that the pods accept, KEY[=VALUE][:EFFECT]. May be repeated.", section=KUBERNETES
    )
    queue: str | None = setting(None, help="Local queue of Kueue, which starts the job.", section=KUBERNETES)
    pod_memory: str | None = setting(
        None, help="Memory of each pod, such as 900Gi, shared memory included. Default: no limit.", section=KUBERNETES
    )
    pod_cpus: int | None = setting(
        None, help="CPU cores that each pod requests. Default: none.", minimum=1, maximum=4096, section=KUBERNETES
    )
    run_as: str = setting(IMAGE_USER, help="User and group of the pods, UID:GID. Root is refused.", section=KUBERNETES)
    deadline_hours: float | None = setting(
        None, help="Hours after which the job is ended. Default: never.", above=0, maximum=8760, section=KUBERNETES
    )
    runtime: str = setting(
        "torch-distributed", help="With --crd trainjob: ClusterTrainingRuntime of the job.", section=KUBERNETES
    )

    def problems(self) -> list[str]:
        found = [*super().problems(), *self._wrong_names(), *self._wrong_lists(), *self._wrong_volumes()]
        if self.pod_memory is not None and not re.fullmatch(r"[1-9][0-9]{0,8}[MGT]i", self.pod_memory):
            found.append(f"--pod-memory: expected a number with Mi, Gi or Ti, such as 900Gi; found {self.pod_memory!r}")
        if not re.fullmatch(r"[1-9][0-9]{0,9}:[1-9][0-9]{0,9}", self.run_as):
            found.append(f"--run-as: expected UID:GID, both above 0; found {self.run_as!r}")
        if self.crd != "trainjob" and self.runtime != "torch-distributed":
            found.append(f"--runtime: expected --crd trainjob with it; found {self.runtime!r}")
        return found

    def _wrong_names(self) -> list[str]:
        forms: tuple[tuple[str, Callable[[str], bool], str], ...] = (
            ("namespace", is_label, "lower-case letters, digits and dashes, at most 63"),
            ("service_account", is_name, "a name of lower-case letters, digits, dashes and dots"),
            ("pull_secret", is_name, "a name of lower-case letters, digits, dashes and dots"),
            ("store_secret", is_name, "a name of lower-case letters, digits, dashes and dots"),
            ("queue", is_label, "lower-case letters, digits and dashes, at most 63"),
            ("runtime", is_name, "a name of lower-case letters, digits, dashes and dots"),
            ("kube_context", _is_context, "a name that does not begin with a dash, without control characters"),
        )
        values = ((name, getattr(self, name), is_right, form) for name, is_right, form in forms)
        return [
            f"--{name.replace('_', '-')}: expected {form}; found {value!r}"
            for name, value, is_right, form in values
            if value is not None and not is_right(value)
        ]

    def _wrong_lists(self) -> list[str]:
        found = []
        listed: tuple[tuple[str, tuple[str, ...], Callable[[str], object]], ...] = (
            ("--volume", self.volume, parse_volume),
            ("--toleration", self.toleration, parse_toleration),
            ("--node-selector", self.node_selector, parse_selector),
            ("--token-secret", (self.token_secret,) if self.token_secret is not None else (), parse_secret),
        )
        for flag, texts, parse in listed:
            for text in texts:
                try:
                    parse(text)
                except ValueError as error:
                    found.append(f"{flag}: {error}")
        keys = [text.partition("=")[0] for text in self.node_selector]
        return found + [f"--node-selector: {key} is given twice" for key in sorted({*keys}) if keys.count(key) > 1]

    def _wrong_volumes(self) -> list[str]:
        paths = [text.split(":")[1] for text in self.volume if ":" in text]
        found = [f"--volume: {path} is given twice" for path in sorted({*paths}) if paths.count(path) > 1]
        if "/checkpoints" not in paths:
            found.append("--volume: expected one for /checkpoints, such as pvc/checkpoints:/checkpoints; found none")
        return found

    @property
    def volumes(self) -> tuple[Volume, ...]:
        """The volumes of checked settings."""
        return tuple(parse_volume(text) for text in self.volume)


def _is_context(text: str) -> bool:
    return text.isprintable() and 0 < len(text) <= 253 and not text.startswith("-")

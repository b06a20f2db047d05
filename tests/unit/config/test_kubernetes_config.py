"""Settings of a job on Kubernetes: names in the forms of RFC 1123; nothing reaches a manifest unchecked."""

from __future__ import annotations

from typing import Any

import pytest

from mixtral_run.config.launchers.kubernetes import (
    KubernetesConfig,
    Toleration,
    Volume,
    parse_secret,
    parse_selector,
    parse_toleration,
    parse_volume,
)

CHECKPOINTS = "pvc/checkpoints:/checkpoints"


def test_values_in_their_forms() -> None:
    assert parse_volume(CHECKPOINTS) == Volume("checkpoints", "/checkpoints")
    assert parse_volume("/srv/my data:/data:ro") == Volume("/srv/my data", "/data", read_only=True)
    assert [parse_volume(text).is_claim for text in (CHECKPOINTS, "/srv:/data")] == [True, False]
    assert parse_toleration("a.b/c=d:NoSchedule") == Toleration("a.b/c", "d", "NoSchedule")
    assert parse_toleration("spot") == Toleration("spot")
    assert parse_toleration("spot:NoExecute") == Toleration("spot", "", "NoExecute")
    assert parse_selector("kubernetes.io/hostname=gpu-01") == ("kubernetes.io/hostname", "gpu-01")
    assert (parse_secret("hf"), parse_secret("hf:my.key")) == (("hf", "token"), ("hf", "my.key"))


WRONG: tuple[tuple[str, Any], ...] = (
    *(("volume", (CHECKPOINTS, text)) for text in (
        "", "data", "pvc/data", "pvc/:/data", "pvc/Data:/data", "pvc/data:data", "pvc/data:/", "pvc/data:/a/../b",
        "pvc/data:/data/", "pvc/data:/data:rw", "pvc/data:/data:ro:ro", "pvc/data:/data:", "data:/data", "./x:/data",
        "/:/data", "/srv/..:/data", "//srv:/data", "/srv\n:/data", f"pvc/{'a' * 254}:/data", "pvc/a..b:/data",
        CHECKPOINTS,
    )),
    ("volume", ("pvc/data:/data",)),
    *(("namespace", text) for text in ("", "Training", "a.b", "-a", "a-", "a" * 64, "a\n", "a b", "a\nkind: x")),
    *(("service_account", text) for text in ("", "A", "a..b", "a_b", "a" * 254)),
    *(("pull_secret", text) for text in ("", "a b", "a/b")),
    *(("token_secret", text) for text in ("", "hf_ABCdef", "a:", "a:b:c", "a:b/c", f"a:{'b' * 254}")),
    *(("node_selector", (text,)) for text in ("", "a", "=b", "a=b c", "a=b=c", "-a=b", "a/b/c=d", f"a={'b' * 64}")),
    ("node_selector", ("a=b", "a=c")),
    *(("toleration", (text,)) for text in ("", "=b", "a=", "a:Never", "a=b:", ":NoSchedule", "a=b c", "-a", "a\n")),
    *(("queue", text) for text in ("", "Q", "a.b", "a" * 64)),
    *(("pod_memory", text) for text in ("", "900", "900G", "900Gigs", "-1Gi", "0Gi", "1.5Gi", "eight")),
    *(("run_as", text) for text in ("", "1000", "0:0", "0:1000", "1000:0", "a:b", "-1:1", "1000:1000:1")),
    *(("kube_context", text) for text in ("", "-x", "--kubeconfig=/x", "a\nb")),
    ("nodes", 0), ("gpus_per_node", -1), ("pod_cpus", 0), ("deadline_hours", 0.0),
    ("crd", "pytorchjob"), ("runtime", "my-runtime"),
)  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_another_form_is_refused_with_its_flag(name: str, value: Any) -> None:
    found = KubernetesConfig(**{"volume": (CHECKPOINTS,), name: value}).problems()
    assert found and all(line.startswith(f"--{name.replace('_', '-')}: ") for line in found)


def test_all_problems_come_at_once_and_none_shows_a_token() -> None:
    found = KubernetesConfig(namespace="A", queue="B", token_secret="hf_secret", toleration=("",)).problems()
    assert [line.partition(":")[0] for line in found] == [
        "--namespace", "--queue", "--toleration", "--token-secret", "--volume"
    ]  # fmt: skip
    assert "hf_secret" not in "\n".join(found)

"""`--hf-model-path NAME` of `convert` against a hub on this machine."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from safetensors.torch import load_file

from mixtral_run import __version__
from mixtral_run.errors import ConfigError, WeightsError
from mixtral_run.model.architecture import MIXTRAL_8X7B
from mixtral_run.terminal.report import Progress, Report
from mixtral_run.weights.hf import hub as source
from tests.multiprocess.weights.test_convert import run_cli
from tests.support.references.model_cases import change_config
from tests.support.servers.hub_server import NAME, Hub, client_environment, serving
from tests.support.tiny import write_tiny


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    write_tiny(tmp_path / "served")
    (tmp_path / "served" / "consolidated.00.pt").write_bytes(b"93 GB that nobody here reads")
    with serving(tmp_path / "served") as server:
        yield server


def convert_from(hub: Hub, tmp_path: Path, *flags: str, name: str = NAME, **environment: str) -> CompletedProcess[str]:
    common = client_environment(hub, tmp_path)
    words = ("convert", "--hf-model-path", name, "--output-path", tmp_path / "out", *flags)
    return run_cli(*words, **(common | environment))


def test_download_that_breaks_off_goes_on_and_the_second_run_needs_none(tmp_path: Path, hub: Hub) -> None:
    hub.cut = "model-00002-of-00003.safetensors"
    size = sum(f.stat().st_size for f in hub.folder.iterdir() if f.name != "consolidated.00.pt")
    done = convert_from(hub, tmp_path, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert f"downloading {size:,} bytes of {NAME}" in done.stdout
    assert "✓ Conversion complete" in done.stdout
    assert hub.sent.count("model-00002-of-00003.safetensors") == 2
    assert hub.sent.count("model-00001-of-00003.safetensors") == 1
    assert "consolidated.00.pt" not in hub.sent
    assert "Bearer hf_secret" in hub.tokens
    assert "hf_secret" not in done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "mixtral_run.json").read_text())
    assert record["source"] == NAME
    (tmp_path / "out").rename(tmp_path / "first")
    hub.sent.clear()
    again = convert_from(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert hub.sent == []


@pytest.mark.parametrize(
    ("state", "environment", "said"),
    [
        ("gated", {}, ["owner asks for your consent", "no token", "hf auth login"]),
        ("gated", {"HF_TOKEN": "hf_secret"}, ["owner asks for your consent", "a token was sent"]),
        ("missing", {}, ["no such model", "no token"]),
        ("open", {"HF_HUB_OFFLINE": "1"}, ["cannot be reached", "HF_HUB_OFFLINE"]),
        ("open", {"HF_ENDPOINT": "http://127.0.0.1:9"}, ["cannot be reached", "HF_ENDPOINT"]),
    ],
)
def test_refusals_in_words(tmp_path: Path, hub: Hub, state: str, environment: dict[str, str], said: list[str]) -> None:
    hub.state = state
    done = convert_from(hub, tmp_path, **environment)
    assert done.returncode == WeightsError.exit_code, done.stderr
    for words in said:
        assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_of_another_model_only_its_config_is_downloaded(tmp_path: Path, hub: Hub) -> None:
    file = hub.folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "llama", "architectures": ["Llama"]}))
    done = convert_from(hub, tmp_path)
    assert done.returncode == WeightsError.exit_code
    assert "llama" in done.stderr
    assert hub.sent == ["config.json"]


def test_a_quantized_model_is_refused_by_its_config_before_anything_else_is_downloaded(
    hub: Hub, tmp_path: Path
) -> None:
    change_config(hub.folder, quantization_config={"quant_method": "gptq", "bits": 4})
    for file in hub.folder.glob("model*"):
        # Such repositories have names of their own for the weights.
        file.rename(hub.folder / f"gptq_{file.name}")
    done = convert_from(hub, tmp_path)
    assert done.returncode == WeightsError.exit_code
    assert "quantized with GPTQ, 4 bit" in done.stderr and "ownload" not in done.stderr
    assert hub.sent == ["config.json"]


def test_weights_in_the_pickled_format_are_downloaded_where_there_are_no_others(hub: Hub, tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for file in hub.folder.glob("model-*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (hub.folder / "model.safetensors.index.json").unlink()
    torch.save(tensors, hub.folder / "pytorch_model.bin")
    done = convert_from(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pytorch_model.bin" in hub.sent and "read from pytorch_model.bin" in done.stdout + done.stderr


def test_neither_a_directory_nor_a_name(tmp_path: Path, hub: Hub) -> None:
    done = convert_from(hub, tmp_path, name="./no/such/folder")
    assert done.returncode == WeightsError.exit_code
    assert "The HF model does not exist." in done.stderr
    assert hub.tokens == set()


def test_what_needs_no_weights_is_found_before_they_are_downloaded(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("not ours")
    done = convert_from(hub, tmp_path, "--tensor-model-parallel-size", "3", "--expert-model-parallel-size", "5")
    assert done.returncode == ConfigError.exit_code, done.stderr
    for words in ("--tensor-model-parallel-size", "--expert-model-parallel-size", "thesis.txt"):
        assert words in done.stderr
    assert hub.sent == ["config.json"]


def test_download_and_checkpoint_have_to_fit_together(tmp_path: Path, hub: Hub, mounted: Path) -> None:
    """On one disk: each alone would fit into what is left."""
    needed = sum(f.stat().st_size for f in hub.folder.glob("*.safetensors")) + 64 * 2**20
    free = shutil.disk_usage(mounted).free
    (mounted / "ballast").write_bytes(b"x" * (free - needed - 100_000))
    environment = client_environment(hub, mounted)
    done = run_cli("convert", "--hf-model-path", NAME, "--output-path", mounted / "out", **environment)
    assert done.returncode == ConfigError.exit_code, done.stderr
    assert f"no space on the disk of {mounted / 'out'}" in done.stderr
    assert hub.sent == ["config.json"]


def test_a_revision(tmp_path: Path, hub: Hub) -> None:
    hub.commits["v1"] = "f" * 40
    done = convert_from(hub, tmp_path, name=f"{NAME}@v1")
    assert done.returncode == 0, done.stderr
    proof = json.loads((tmp_path / "out" / "proof.json").read_text())
    assert proof["source"]["revision"] == "f" * 40
    assert proof["kit_version"] == __version__
    none = convert_from(hub, tmp_path, "--overwrite", name=f"{NAME}@v2")
    assert none.returncode == WeightsError.exit_code
    assert "no such revision" in none.stderr
    assert "v2" in none.stderr


def test_how_far_a_download_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_POLL_SECONDS", 0.01)
    model = source.HubModel(NAME, MIXTRAL_8X7B, 0, 2**20, tmp_path)
    blobs = tmp_path / "models--mistralai--Tiny-Mixtral" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "earlier").write_bytes(b"x" * 2**20)
    reported: list[int] = []
    seen = threading.Event()

    class Counting(Report):
        @contextmanager
        def progress(self, total: int, what: str, unit: str = "bytes") -> Iterator[Progress]:
            class Count(Progress):
                def advance(self, amount: int) -> None:
                    reported.append(amount)
                    if sum(reported) >= total:
                        seen.set()

            yield Count()

    with source._watched(model, Counting()):
        (blobs / "now.incomplete").write_bytes(b"x" * 2**19)
        (blobs / "whole").write_bytes(b"x" * 2**19)
        assert seen.wait(30)
    assert sum(reported) == 2**20
    # What came after the last look is there at the end.
    reported.clear()
    with source._watched(model, Counting()):
        pass
    assert sum(reported) == 2**20

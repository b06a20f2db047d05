"""`export`: the model card, the tokenizer next to the adapter, and the upload to the hub."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import RepositoryNotFoundError

from mixtral_run.config.verbs.generate import GenerateConfig
from mixtral_run.config.verbs.weights import ExportConfig, VerifyConfig
from mixtral_run.errors import ConfigError, WeightsError
from mixtral_run.inference.session import open_session
from mixtral_run.terminal.report import Report
from mixtral_run.weights.adapter.export import export
from mixtral_run.weights.manifest.manifest import read_values
from mixtral_run.weights.manifest.template_record import TemplateRecord
from mixtral_run.weights.verify.verify import verify
from tests.multiprocess.talking.conftest import Adapted
from tests.unit.train.data.templates.test_jinja_template import MARKED

NAME = "mistralai/Mixtral-8x7B-v0.1"
TRAINING = {"lr": 1e-4, "train_iters": 10, "seq_length": 64, "data_path": ["/secret/data.jsonl"], "save": "/secret/out"}


@pytest.fixture
def adapter(adapted: Adapted, tmp_path: Path) -> Path:
    """The adapter with the tokenizer next to it, and with what finetune records."""
    folder = tmp_path / "adapter"
    shutil.copytree(adapted.adapter, folder)
    shutil.copytree(adapted.base / "tokenizer", folder / "tokenizer")
    record = folder / "iter_0000010" / "mixtral_run.json"
    values = read_values(record.parent)
    values |= {
        "training": TRAINING, "data_sha256": "ab" * 32,
        "chat_template": None,
        "state": {"recent_losses": [2.5, 1.25], "validation_loss": 1.5},
        "validation": {"iteration": 10, "loss": 1.5, "best_iteration": 6, "best_loss": 1.375,
                       "num_without_improvement": 1},
    }  # fmt: skip

    del values["crc32"]
    record.write_text(json.dumps(values))
    return folder


def exported(adapter: Path, folder: Path, **settings: Any) -> Path:
    export(ExportConfig(**({"adapter": (str(adapter),), "output_path": folder} | settings)).check(), Report.silent())
    return folder


def front_matter(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.mark.parametrize("layout", ["peft", "vllm", "peft-fused"])
def test_card_and_tokenizer(adapter: Path, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtral_run.weights.adapter.export._base_name", lambda *_: f"{NAME}@abc")
    folder = exported(adapter, tmp_path / "peft", format=layout)
    front, body = front_matter(folder)
    assert (front["base_model"], front["library_name"]) == (NAME, "peft")
    for text in ("ab" * 32, "| lr | 0.0001 |", "| train_iters | 10 |", "rank 4, alpha 10", "| 1.2500 |", "| 1.5000 |",
                 "1.3750 at iteration 6", read_values(adapter / "iter_0000010")["base"]["fingerprint"]):  # fmt: skip
        assert text in body, text
    assert "/secret" not in body and str(tmp_path) not in body, "the card names no path of this machine"
    assert ("vllm serve" in body) == (layout != "peft-fused")
    assert ("Not for vLLM" in body) == (layout == "peft-fused")
    from transformers import AutoTokenizer

    ours, base = (AutoTokenizer.from_pretrained(each) for each in (folder, adapter / "tokenizer"))
    assert ours.encode("Grüße!") == base.encode("Grüße!")
    assert not (folder / "config.json").exists(), "a PEFT directory is no model"


def test_peft_still_loads_it(adapted: Adapted, adapter: Path, tmp_path: Path) -> None:
    import copy

    import torch
    from peft import PeftModel

    folder = exported(adapter, tmp_path / "peft")
    front, _ = front_matter(folder)
    assert "base_model" not in front, "a folder of this machine is no name"
    model = PeftModel.from_pretrained(copy.deepcopy(adapted.hf.model), str(folder)).eval()
    tokens = torch.tensor([[1, 5, 9, 30, 77]])
    with torch.inference_mode():
        assert (model(tokens).logits - adapted.merged.model(tokens).logits).abs().max() < 1e-4


def with_template(adapter: Path, record: TemplateRecord | None) -> Path:
    file = adapter / "iter_0000010" / "mixtral_run.json"
    values = json.loads(file.read_text()) | {"chat_template": None if record is None else record.to_mapping()}
    file.write_text(json.dumps(values))
    return adapter


@pytest.mark.parametrize("layout", ["peft", "vllm", "peft-fused"])
@pytest.mark.parametrize("record", [TemplateRecord("own.jinja", MARKED), TemplateRecord("mixtral")])
def test_an_exported_adapter_keeps_its_chat_template(
    adapted: Adapted, adapter: Path, tmp_path: Path, record: TemplateRecord, layout: str
) -> None:
    """Also if the tokenizer next to it has another one."""
    (adapter / "tokenizer" / "chat_template.jinja").write_text("{{ 'other' }}")
    folder = exported(with_template(adapter, record), tmp_path / "peft", format=layout)
    for given in (folder, adapter):
        session = open_session(GenerateConfig(load=adapted.base, adapter=given, prompt=("a",)))
        assert session.template.record == record and session.warnings == ()


@pytest.mark.parametrize(
    "damage", [{"text": "{{ other }}"}, {"name": "\x1b]0;x\x07"}, {"fingerprint": "0"}, {"tools_text": 5}]
)
def test_a_damaged_template_of_an_exported_adapter_is_refused(
    adapted: Adapted, adapter: Path, tmp_path: Path, damage: dict[str, Any]
) -> None:
    folder = exported(with_template(adapter, TemplateRecord("own.jinja", MARKED)), tmp_path / "peft")
    file = folder / "mixtral_run.json"
    values = json.loads(file.read_text())
    values["chat_template"] |= damage
    file.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=r"mixtral_run\.json") as caught:
        open_session(GenerateConfig(load=adapted.base, adapter=folder, prompt=("a",)))
    assert "\x1b" not in str(caught.value)


def test_an_adapter_of_another_program_has_the_template_of_its_files(
    adapted: Adapted, adapter: Path, tmp_path: Path
) -> None:
    """Without a file it is that of the base's tokenizer."""
    folder = exported(adapter, tmp_path / "peft")
    (folder / "mixtral_run.json").unlink()
    config = GenerateConfig(load=adapted.base, adapter=folder, prompt=("a",))
    base = open_session(replace(config, adapter=None)).template.record
    assert open_session(config).template.record == base and open_session(config).warnings == ()
    (folder / "chat_template.jinja").write_text(MARKED)
    session = open_session(config)
    assert session.template.record == TemplateRecord("tokenizer", MARKED)
    assert len(session.warnings) == 1 and "the adapter's is used" in session.warnings[0]
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(WeightsError, match="chat template cannot be read"):
        open_session(config)


def test_an_adapter_without_checksums_has_no_proof(adapted: Adapted) -> None:
    assert verify(VerifyConfig(load=adapted.adapter), Report.silent()).problems == ()
    with pytest.raises(ConfigError, match="no checksums"):
        verify(VerifyConfig(load=adapted.adapter, proof=True), Report.silent())


class _Hub:
    """STAND-IN for the API of the hub. It notes what it is asked. is_private: None if there is no repository."""

    calls: list[tuple[Any, ...]]
    is_private: bool | None = None
    broken: str | None = None

    def __init__(self, token: str | None) -> None:
        self.calls.append(("token", token))

    def whoami(self) -> None:
        if self.broken == "token":
            raise OSError("401 Client Error: Invalid user token\nand more")

    def repo_info(self, name: str) -> Any:
        if self.is_private is None:
            import httpx2 as httpx

            raise RepositoryNotFoundError("404", response=httpx.Response(404, request=httpx.Request("GET", "http://x")))
        return type("Info", (), {"private": self.is_private})

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        self.calls.append(("create", name, private, exist_ok))

    def upload_folder(self, *, folder_path: str, repo_id: str, ignore_patterns: list[str], commit_message: str) -> Any:
        if self.broken == "upload":
            raise ConnectionError("connection reset")
        files = {path.name for path in Path(folder_path).iterdir()} - set(ignore_patterns)
        self.calls.append(("upload", repo_id, files))
        return type("Commit", (), {"commit_url": "https://hub/commit/1"})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[_Hub]:
    kind = type("Hub", (_Hub,), {"calls": []})
    monkeypatch.setattr(huggingface_hub, "HfApi", kind)
    return kind


def test_a_push_is_private_and_leaves_local_paths_out(adapter: Path, tmp_path: Path, hub: type[_Hub]) -> None:
    (tmp_path / "token").write_text("hf_secret\n")
    exported(adapter, tmp_path / "peft", push="me/adapter", hf_token_file=tmp_path / "token")
    token, create, upload = hub.calls
    assert token == ("token", "hf_secret")
    assert create == ("create", "me/adapter", True, True)
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= upload[2]
    assert "mixtral_run.json" not in upload[2]


@pytest.mark.parametrize("public", [True, False])
def test_what_everybody_sees_must_be_asked_for(adapter: Path, tmp_path: Path, hub: type[_Hub], public: bool) -> None:
    hub.is_private = False
    if public:
        exported(adapter, tmp_path / "peft", push="me/adapter", push_public=True)
        assert ("create", "me/adapter", False, True) in hub.calls
        return
    with pytest.raises(ConfigError, match="everybody can see it"):
        exported(adapter, tmp_path / "peft", push="me/adapter")
    assert not (tmp_path / "peft").exists(), "nothing is exported before the check"


def test_what_goes_wrong_with_the_hub(adapter: Path, tmp_path: Path, hub: type[_Hub]) -> None:
    hub.broken = "token"
    with pytest.raises(ConfigError) as refused:
        exported(adapter, tmp_path / "peft", push="me/adapter")
    assert "Invalid user token" in str(refused.value) and "and more" not in str(refused.value)
    hub.broken = "upload"
    with pytest.raises(WeightsError) as failed:
        exported(adapter, tmp_path / "peft", push="me/adapter")
    assert "hf upload me/adapter" in str(failed.value) and (tmp_path / "peft" / "README.md").exists()
    (tmp_path / "empty").write_text("two words")
    for settings, found in (
        ({"push": "adapter"}, "OWNER/NAME"), ({"push_public": True}, "--push NAME"),
        ({"push": "a/b", "hf_token_file": tmp_path / "empty"}, "one word"),
        ({"push": "a/b", "hf_token_file": tmp_path / "none"}, "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            exported(adapter, tmp_path / "other", **settings)
        assert found in str(caught.value)

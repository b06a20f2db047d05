"""A tiny model with an adapter, and the oracle: HF's greedy answers, of the base and of weights merged by hand."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.multiprocess.verbs.test_export import ALL, merged_by_hand, write_adapter
from tests.support.tiny import write_shards


@dataclass(frozen=True)
class Oracle:
    """HF's model and tokenizer of a directory."""

    folder: Path

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def greedy(self, text: str, count: int) -> str:
        """The answer to a prompt that is rendered by hand, from <s> on."""
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        new = self.model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True)).strip()


def rendered(turns: Sequence[tuple[str, str | None]], system: str = "") -> str:
    """A conversation in Mixtral-Instruct's form, written by hand."""
    found = "<s>"
    for number, (question, answer) in enumerate(turns):
        task = f"{system}\n\n{question}" if system and number == 0 else question
        found += f"[INST] {task} [/INST]" + (f" {answer}</s>" if answer is not None else "")
    return found


@dataclass(frozen=True)
class Adapted:
    """Folders of a converted base and of an adapter for it; HF's models of the base, and of both merged by hand."""

    base: Path
    adapter: Path
    hf: Oracle
    merged: Oracle


@pytest.fixture(scope="session")
def adapted(small_hf_model: Path, small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    root = tmp_path_factory.mktemp("adapted")
    (root / "hf").symlink_to(small_hf_model)
    (root / "base").symlink_to(small_checkpoint)
    tensors = write_adapter(root, root / "adapter", ALL)
    merged = root / "merged"
    shutil.copytree(small_hf_model, merged, ignore=shutil.ignore_patterns("*.safetensors*"))
    write_shards(merged, merged_by_hand(root, tensors), 1)
    return Adapted(small_checkpoint, root / "adapter", Oracle(small_hf_model), Oracle(merged))

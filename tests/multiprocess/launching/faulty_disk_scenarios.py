"""The writers that faulty_disk_worker.py runs on a disk that fails: what they write, and what must be there after."""

from __future__ import annotations

import hashlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.config.verbs.weights import ConvertConfig, ExportConfig
from mixtral_run.errors import WeightsError
from mixtral_run.fleet import state
from mixtral_run.fleet.hosts import parse_host
from mixtral_run.fleet.jobs.fetch import fetch
from mixtral_run.fleet.ssh.connection import Ssh
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.terminal.report import Report
from mixtral_run.train.checkpoints.saving import AdapterSaver, SaveRequest
from mixtral_run.train.metrics import append
from mixtral_run.train.steps.step import trainable
from mixtral_run.weights.adapter.export import export
from mixtral_run.weights.convert.to_hf import to_hf
from mixtral_run.weights.convert.to_megatron import convert
from mixtral_run.weights.manifest.adapter_files import check_adapter
from mixtral_run.weights.manifest.checkpoint_folder import open_checkpoint
from mixtral_run.weights.manifest.describe import describe_adapter, describe_base
from mixtral_run.weights.quantized_cache.layout import check, find_caches
from tests.multiprocess.verbs.test_export import write_adapter
from tests.support.adapters import save_adapter
from tests.support.quantized_cache import start
from tests.support.tiny import write_tiny
from tests.unit.fleet.hostile_tar import FILE, LINK, PEFT, stream
from tests.unit.fleet.jobs.test_listing import listed
from tests.unit.model.recompute.test_recompute import model_of

ONE = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cpu")
Content = Mapping[str, str]


class Scenario(ABC):
    """A writer. `write` runs with the disk that fails, on a copy of what `prepare` left in DISK.

    eio_stays: an input or output error stays. Else it happens once. is_killed: the process ends at the call.
    """

    eio_stays = is_killed = False

    def __init__(self, folder: Path) -> None:
        self.folder, self.disk = folder, folder / "disk"

    @abstractmethod
    def prepare(self) -> None:
        """Write the inputs, and into `disk` the good state of an earlier run."""

    @abstractmethod
    def write(self) -> None:
        """Write the new state."""

    @abstractmethod
    def content(self) -> Content:
        """Read the state as its users do; it is the earlier or the new one."""


def files_of(folder: Path, pattern: str) -> Content:
    found = {str(each.relative_to(folder)): each for each in folder.rglob(pattern) if each.is_file()}
    return {name: hashlib.sha256(each.read_bytes()).hexdigest() for name, each in found.items()}


class Convert(Scenario):
    def prepare(self) -> None:
        for number in (0, 1):
            write_tiny(self.folder / f"hf-{number}", seed=number, num_shards=1, num_hidden_layers=1)
        self._convert(0)

    def write(self) -> None:
        self._convert(1)

    def _convert(self, number: int) -> None:
        config = ConvertConfig(
            hf_model_path=str(self.folder / f"hf-{number}"), output_path=self.disk / "base", overwrite=True, workers=1,
            tensor_model_parallel_size=1, expert_model_parallel_size=1,
        )  # fmt: skip
        convert(config, Report.silent())

    def content(self) -> Content:
        (self.disk / "base" / "latest_checkpointed_iteration.txt").read_text()
        return files_of(self.disk / "base", "*.distcp")


class ConvertBack(Convert):
    def prepare(self) -> None:
        super().prepare()
        shutil.move(self.disk / "base", self.folder / "base-0")
        self._convert(1)
        shutil.move(self.disk / "base", self.folder / "base-1")
        self._back(0)

    def write(self) -> None:
        self._back(1)

    def _back(self, number: int) -> None:
        base = self.folder / f"base-{number}"
        to_hf(ConvertConfig(from_megatron=base, output_path=self.disk / "hf", overwrite=True), Report.silent())

    def content(self) -> Content:
        (self.disk / "hf" / "mixtral_run.json").read_text()
        return files_of(self.disk / "hf", "*.safetensors")


def save(folder: Path, iteration: int, *, background: bool = False) -> None:
    lora = LoraSettings(4, 8.0, 0.0, ("linear_qkv",), 1)
    with open_mesh(ONE) as mesh:
        model = model_of(mesh, "none", modules=("linear_qkv",))
        optimizer = torch.optim.AdamW(trainable(model), lr=iteration * 1e-2)
        for parameter in trainable(model):
            parameter.grad = torch.full_like(parameter, float(iteration))
        optimizer.step()
        description = {
            "dtype": "float32", "base": {"fingerprint": "0-0", "path": None}, "training": {}, "data_sha256": None,
            "lora": lora.to_mapping(),
        }  # fmt: skip
        if not background:
            save_adapter(model, optimizer, folder, iteration, description)
            return
        with AdapterSaver(model, optimizer, folder) as saver:
            saver.prepare_background()
            saver.save_in_background(SaveRequest(iteration, description))
            optimizer.step()  # the training continues
            saver.finish()


class Save(Scenario):
    # torch's writer in C++ does not pass the system's error on; the kit asks the disk afterwards.
    eio_stays = True

    def prepare(self) -> None:
        save(self.disk / "adapter", 3)

    def write(self) -> None:
        save(self.disk / "adapter", 4)
        append(self.disk / "adapter" / "metrics.jsonl", "{}\n")

    def content(self) -> Content:
        adapter = describe_adapter(self.disk / "adapter")
        assert adapter.files.keys() == {each.name for each in adapter.folder.iterdir()} - {"mixtral_run.json"}
        return files_of(adapter.folder, "*.distcp")


class SaveInBackground(Save):
    def write(self) -> None:
        save(self.disk / "adapter", 4, background=True)


class SaveKilled(SaveInBackground):
    is_killed = True

    def content(self) -> Content:
        # A half of a checkpoint is never taken for one: what the marker names has all its files as they were written.
        check_adapter(open_checkpoint(self.disk / "adapter"), Report.silent())
        return super().content()


class Export(Scenario):
    def prepare(self) -> None:
        for number in (3, 4):
            save(self.folder / f"adapter-{number}", number)
        self._export(3)

    def write(self) -> None:
        self._export(4)

    def _export(self, number: int) -> None:
        adapter = self.folder / f"adapter-{number}"
        export(ExportConfig(adapter=(str(adapter),), output_path=self.disk / "peft", overwrite=True), Report.silent())

    def content(self) -> Content:
        (self.disk / "peft" / "mixtral_run.json").read_text()
        return files_of(self.disk / "peft", "*.safetensors")


class Merge(Scenario):
    def prepare(self) -> None:
        write_tiny(self.folder / "hf", num_shards=2, num_hidden_layers=1)
        config = ConvertConfig(
            hf_model_path=str(self.folder / "hf"), output_path=self.folder / "base", workers=1,
            tensor_model_parallel_size=1, expert_model_parallel_size=1,
        )  # fmt: skip
        convert(config, Report.silent())
        for number in (0, 1):
            targets = ("linear_qkv", "linear_fc1")[: number + 1]
            write_adapter(self.folder, self.folder / f"adapter-{number}", targets)
        self._merge(0)

    def write(self) -> None:
        self._merge(1)

    def _merge(self, number: int) -> None:
        config = ExportConfig(
            adapter=(str(self.folder / f"adapter-{number}"),), hf_model_path=self.folder / "hf",
            output_path=self.disk / "merged", merge=True, overwrite=True,
        )  # fmt: skip
        export(config, Report.silent())

    def content(self) -> Content:
        (self.disk / "merged" / "mixtral_run.json").read_text()
        return files_of(self.disk / "merged", "*.safetensors")


class QuantizedCache(Scenario):
    """A cache that cannot be written ends no run; the warning has the system's word and the flag that does not try."""

    def prepare(self) -> None:
        write_tiny(self.folder / "hf", num_shards=1)
        config = ConvertConfig(
            hf_model_path=str(self.folder / "hf"), output_path=self.disk / "base", workers=1,
            tensor_model_parallel_size=1, expert_model_parallel_size=1,
        )  # fmt: skip
        convert(config, Report.silent())

    def write(self) -> None:
        said = start(self.disk / "base").said
        if "!" in said:
            flag = "--quantized-cache use does not try"
            raise WeightsError("No cache.", found=said, next_command=flag if flag in said else None)

    def content(self) -> Content:
        base = describe_base(self.disk / "base")
        lookup = find_caches(base).get("fp8")
        files = files_of(self.disk / "base", "*.distcp")
        if lookup is None:
            return {**files, "cache": "none"}
        return {**files, "cache": "damaged" if lookup.cache is None or check(lookup.cache) else "whole"}


class State(Scenario):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        os.environ["XDG_STATE_HOME"] = str(self.disk)

    def prepare(self) -> None:
        state.write_json(state.state_folder() / "fleet.json", {"hosts": 1})

    def write(self) -> None:
        state.write_json(state.state_folder("locks").parent / "fleet.json", {"hosts": 2})

    def content(self) -> Content:
        return {"hosts": str(state.read_json(self.disk / "mixtral-run" / "fleet.json", None)["hosts"])}


class Fetch(Scenario):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        hostile = Path(__file__).parents[2] / "unit" / "fleet" / "hostile"
        os.environ |= {"PATH": f"{hostile}{os.pathsep}{os.environ['PATH']}", "EVIL": str(self.folder / "sent")}
        os.environ["XDG_STATE_HOME"] = str(self.folder / "state")

    def prepare(self) -> None:
        (self.disk / "here").mkdir(parents=True)
        (self.disk / "here" / "earlier").write_text("content")
        sent = stream([PEFT, ("peft/a", FILE, b"x" * 100_000), ("peft/b", FILE, b"y")])
        (self.folder / "sent").write_bytes(sent)

    def write(self) -> None:
        ssh = Ssh(self.folder / "known_hosts")
        fetch(parse_host("evil"), "/checkpoints/peft", self.disk / "here", ssh, overwrite=True)

    def content(self) -> Content:
        # A disk that refuses to move the earlier content back: the error says where it is.
        aside = [*self.disk.glob(".mixtral-run-fetch-*/old")]
        here = self.disk / "here"
        return files_of(here if here.exists() else aside[0], "*")


class Continue(Fetch):
    """Fetch with rsync. STAND-IN for rsync: it copies the files that it is asked for with plain writes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        os.environ["LISTING"] = str(folder / "listing")
        os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def prepare(self) -> None:
        super().prepare()
        (self.folder / "bin").mkdir()
        program = self.folder / "bin" / "rsync"
        program.write_text(
            '#!/bin/sh\ncase "$1" in --version) echo "rsync  version 3.2.7  protocol"; exit;; esac\n'
            'for last; do :; done\ncat >/dev/null\nprintf 1234 > "$last/peft/a"; printf y > "$last/peft/b"\n'
        )
        program.chmod(0o755)
        entries = [PEFT, ("peft/a", FILE, b"1234"), ("peft/b", FILE, b"y"), ("peft/l", LINK, "a")]
        (self.folder / "listing").write_bytes(listed(entries))


SCENARIOS = {
    each.__name__: each
    for each in (
        Convert,
        ConvertBack,
        Save,
        SaveInBackground,
        SaveKilled,
        Export,
        Merge,
        QuantizedCache,
        State,
        Fetch,
        Continue,
    )
}

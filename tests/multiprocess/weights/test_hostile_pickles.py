"""Checkpoints and adapters whose pickles run a command: nothing of it runs, whichever verb reads them.

The payload makes an empty file where it is run. Loaded without restrictions, the rest of the pickle is read as if
nothing was (`test_the_payload_runs_without_restrictions`).
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_run.config.verbs.weights import ConvertConfig, ExportConfig, VerifyConfig
from mixtral_run.errors import WeightsError
from mixtral_run.terminal.report import Report
from mixtral_run.weights.adapter.export import export
from mixtral_run.weights.convert.to_hf import to_hf
from mixtral_run.weights.manifest.describe import describe_adapter, describe_base
from mixtral_run.weights.mapping.hf_to_megatron import LINEAR_QKV_KEY
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader
from mixtral_run.weights.torch_dist.metadata import METADATA_NAME, read_metadata
from mixtral_run.weights.verify.verify import verify
from tests.multiprocess.conftest import mixtral_run
from tests.multiprocess.verbs.test_export import write_adapter
from tests.multiprocess.weights.test_convert import convert_quietly
from tests.support.tiny import write_tiny

ADAPTER_KEY = "decoder.layers.self_attention.linear_qkv.adapter.linear_in.weight"


class Payload:
    def __init__(self, marker: Path) -> None:
        self._command = f"touch {marker}"

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (os.system, (self._command,))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf, its converted checkpoint base, and an adapter of it."""
    root = tmp_path_factory.mktemp("made")
    write_tiny(root / "hf")
    convert_quietly(root / "hf", root / "base", 2, 4)
    write_adapter(root, root / "adapter", ("linear_qkv", "linear_fc1"))
    return root


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """A copy to damage, whose adapter has no checksums: whoever poisons a file can also remove or correct them."""
    shutil.copytree(made, tmp_path / "own")
    for manifest in (tmp_path / "own" / "adapter").glob("iter_*/mixtral_run.json"):
        values = json.loads(manifest.read_text())
        for name in ("crc32", "files"):
            values.pop(name, None)
        manifest.write_text(json.dumps(values))
    return tmp_path / "own"


def poison_metadata(folder: Path, marker: Path) -> None:
    """Put a call before everything else, and drop its result."""
    file = next(folder.glob("iter_*/.metadata"))
    content = file.read_bytes()
    assert content[:1] == b"\x80", "a pickle of protocol 2 or newer"
    file.write_bytes(content[:2] + f"cposix\nsystem\n(S'touch {marker}'\ntR0".encode() + content[2:])


def poison_common(folder: Path, marker: Path) -> None:
    torch.save({"a": Payload(marker)}, next(folder.glob("iter_*")) / "common.pt")


def poison_item(folder: Path, marker: Path, *, zipped: bool) -> None:
    """Let `.metadata` name a hostile item, in a file of its own, as the first chunk of a tensor."""
    iteration = next(folder.glob("iter_*"))
    stream = io.BytesIO()
    torch.save(Payload(marker), stream, _use_new_zipfile_serialization=zipped)
    (iteration / "__9_0.distcp").write_bytes(stream.getvalue())
    metadata = read_metadata(iteration)
    keys = (LINEAR_QKV_KEY, ADAPTER_KEY, f"optimizer.exp_avg.{ADAPTER_KEY}")
    for key in keys:
        for index in [each for each in metadata.storage_data if each.fqn == key][:1]:
            info = metadata.storage_data[index]
            info.relative_path, info.offset, info.length = "__9_0.distcp", 0, len(stream.getvalue())
    (iteration / METADATA_NAME).write_bytes(pickle.dumps(metadata))


def poison_zipped_item(folder: Path, marker: Path) -> None:
    poison_item(folder, marker, zipped=True)


def poison_legacy_item(folder: Path, marker: Path) -> None:
    poison_item(folder, marker, zipped=False)


def verify_base(own: Path) -> None:
    verify(VerifyConfig(load=own / "base", against=own / "hf"), Report.silent()).check()


def verify_adapter(own: Path) -> None:
    verify(VerifyConfig(load=own / "adapter"), Report.silent()).check()


def convert_back(own: Path) -> None:
    to_hf(ConvertConfig(from_megatron=own / "base", output_path=own / "out"), Report.silent())


def convert_back_with_adapter(own: Path) -> None:
    adapter = own / "adapter"
    to_hf(ConvertConfig(from_megatron=own / "base", adapter=(str(adapter),), output_path=own / "out"), Report.silent())


def export_adapter(own: Path) -> None:
    export(ExportConfig(adapter=(str(own / "adapter"),), output_path=own / "out"), Report.silent())


def load(own: Path, name: str) -> None:
    """Load as `generate` does, or the optimizer's state as `finetune --resume` does."""
    from mixtral_run.model.mixtral import is_adapter
    from mixtral_run.model.parallel.mesh import open_mesh
    from mixtral_run.train.checkpoints.checkpoint import load_optimizer
    from mixtral_run.train.load_model import load_for_inference

    base = describe_base(own / "base")
    adapter = describe_adapter(own / "adapter") if name != "base" else None
    config = VerifyConfig(load=own / "base", device="cpu", tensor_model_parallel_size=1, expert_model_parallel_size=1)
    with open_mesh(config) as mesh:
        model = load_for_inference(config, base, mesh, adapter)
        if name == "optimizer" and adapter is not None:
            parameters = [each.requires_grad_() for key, each in model.gpt.named_parameters() if is_adapter(key)]
            load_optimizer(model, torch.optim.AdamW(parameters), adapter)


def load_base(own: Path) -> None:
    load(own, "base")


def load_adapter(own: Path) -> None:
    load(own, "adapter")


def load_optimizer(own: Path) -> None:
    load(own, "optimizer")


OF_A_BASE = (verify_base, convert_back, load_base)
OF_AN_ADAPTER = (verify_adapter, export_adapter, convert_back_with_adapter, load_adapter)


def test_the_payload_runs_without_restrictions(own: Path, tmp_path: Path) -> None:
    """The cases below are worth something: each poisoned file would run, and be read to its end."""
    for number, poison in enumerate((poison_metadata, poison_common, poison_zipped_item, poison_legacy_item)):
        folder, marker = tmp_path / str(number), tmp_path / f"ran-{number}"
        shutil.copytree(own / "adapter", folder)
        poison(folder, marker)
        iteration = next(folder.glob("iter_*"))
        if poison is poison_metadata:
            with (iteration / METADATA_NAME).open("rb") as stream:
                assert pickle.load(stream).storage_data
        else:
            file = iteration / ("common.pt" if poison is poison_common else "__9_0.distcp")
            torch.load(file, weights_only=False)
        assert marker.exists()


CASES = [("base", use) for use in OF_A_BASE] + [("adapter", use) for use in OF_AN_ADAPTER]


@pytest.mark.parametrize(("name", "use"), CASES, ids=[use.__name__ for _, use in CASES])
def test_metadata_is_refused(own: Path, tmp_path: Path, name: str, use: Callable[[Path], None]) -> None:
    poison_metadata(own / name, tmp_path / "ran")
    with pytest.raises(WeightsError) as caught:
        use(own)
    assert not (tmp_path / "ran").exists()
    assert "would run code" in str(caught.value) and "posix.system" in str(caught.value)
    assert str(next((own / name).glob("iter_*/.metadata"))) in str(caught.value)
    assert not (own / "out").exists()


@pytest.mark.parametrize(("name", "use"), CASES, ids=[use.__name__ for _, use in CASES])
def test_common_is_never_read(own: Path, tmp_path: Path, name: str, use: Callable[[Path], None]) -> None:
    poison_common(own / name, tmp_path / "ran")
    use(own)
    assert not (tmp_path / "ran").exists()


ITEMS = [
    *(("base", use) for use in OF_A_BASE),
    *(("adapter", use) for use in (export_adapter, convert_back_with_adapter, load_adapter)),
]


@pytest.mark.parametrize("poison", [poison_zipped_item, poison_legacy_item])
@pytest.mark.parametrize(("name", "use"), ITEMS, ids=[use.__name__ for _, use in ITEMS])
def test_items_of_tensors_are_refused(
    own: Path,
    tmp_path: Path,
    name: str,
    use: Callable[[Path], None],
    poison: Callable[[Path, Path], None],
) -> None:
    poison(own / name, tmp_path / "ran")
    with pytest.raises(WeightsError) as caught:
        use(own)
    assert not (tmp_path / "ran").exists()
    assert "__9_0.distcp" in str(caught.value) and "weights_only" not in str(caught.value)
    assert "posix.system" in str(caught.value)


def test_the_optimizers_state_is_refused(made: Path, tmp_path: Path) -> None:
    """A hostile item among the optimizer's moments alone: the adapter itself loads."""
    own = tmp_path / "own"
    shutil.copytree(made, own)
    iteration = next((own / "adapter").glob("iter_*"))
    before = read_metadata(iteration)
    poison_item(own / "adapter", tmp_path / "ran", zipped=True)
    after = read_metadata(iteration)
    for index, info in before.storage_data.items():
        if not index.fqn.startswith("optimizer."):
            after.storage_data[index] = info
    for key in [key for key in after.state_dict_metadata if key.startswith("optimizer.exp_avg.")]:
        moment = key.replace("exp_avg", "exp_avg_sq")
        after.state_dict_metadata[moment] = after.state_dict_metadata[key]
        for index in [each for each in after.storage_data if each.fqn == key]:
            twin = type(index)(moment, index.offset, index.index)
            after.storage_data[twin] = after.storage_data[index]
    (iteration / METADATA_NAME).write_bytes(pickle.dumps(after))
    load_adapter(own)
    with pytest.raises(WeightsError, match=r"posix\.system"):
        load_optimizer(own)
    assert not (tmp_path / "ran").exists()


def test_a_file_outside_the_folder_is_refused(own: Path) -> None:
    iteration = next((own / "adapter").glob("iter_*"))
    metadata = read_metadata(iteration)
    info = next(iter(metadata.storage_data.values()))
    name = info.relative_path
    shutil.copy(iteration / name, own / name)
    info.relative_path = f"../../{name}"
    (iteration / METADATA_NAME).write_bytes(pickle.dumps(metadata))
    with pytest.raises(WeightsError, match="not a file of this folder"), Reader(iteration):
        pass


@pytest.mark.parametrize("verb", ["generate", "finetune"])
def test_the_command_line_refuses_a_hostile_adapter(
    small_checkpoint: Path, small_hf_model: Path, tmp_path: Path, verb: str
) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "hf").symlink_to(small_hf_model)
    (tmp_path / "root" / "base").symlink_to(small_checkpoint)
    adapter = tmp_path / "adapter"
    write_adapter(tmp_path / "root", adapter, ("linear_qkv",))
    poison_metadata(adapter, tmp_path / "ran")
    layout = ("--tensor-model-parallel-size", "1", "--expert-model-parallel-size", "1", "--device", "cpu")
    if verb == "generate":
        words = ("--adapter", str(adapter), "--prompt", "Once", "--max-new-tokens", "2")
    else:
        lora = ("--lora-rank", "4", "--lora-alpha", "10", "--lora-target-modules", "linear_qkv")
        words = ("--save", str(adapter), "--resume", "--mock-data", "--train-iters", "12", "--seq-length", "32", *lora)
    done = mixtral_run(verb, "--load", str(small_checkpoint), *layout, *words)
    assert done.returncode == WeightsError.exit_code, done.stdout + done.stderr
    assert "would run code" in done.stderr and "posix.system" in done.stderr and ".metadata" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ran").exists()

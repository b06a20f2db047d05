"""mixtral_run.json: one reader with one set of rules, whichever verb asks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtral_run import __version__
from mixtral_run.config.verbs.generate import GenerateConfig
from mixtral_run.config.verbs.plan import PlanConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.config.verbs.weights import ConvertConfig, ExportConfig, VerifyConfig
from mixtral_run.errors import MixtralRunError, WeightsError
from mixtral_run.model.adapters.lora_settings import LORA_SETTINGS, LoraSettings
from mixtral_run.model.architecture import MIXTRAL_8X7B
from mixtral_run.terminal.report import Report
from mixtral_run.weights.manifest.checkpoint_folder import LATEST, Checkpoint, files_manifest_of, open_checkpoint
from mixtral_run.weights.manifest.describe import describe_adapter, describe_base
from mixtral_run.weights.manifest.manifest import (
    MANIFEST_NAME,
    AdapterManifest,
    BaseManifest,
    ExportManifest,
    QuantizedCacheManifest,
    TrainedManifest,
    is_kind,
    read_checkpoint_manifest,
    read_manifest,
    read_values,
    write_manifest,
)
from mixtral_run.weights.manifest.template_record import TemplateRecord

ONE_PROCESS: dict[str, Any] = {
    "device": "cpu",
    "tensor_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "nproc_per_node": 1,
}
LORA = LoraSettings(16, 32.0, 0.1, ("linear_qkv", "linear_fc1"))
BASE: dict[str, Any] = {
    "architecture": MIXTRAL_8X7B.to_mapping(),
    "dtype": "bfloat16",
    "tensor_model_parallel_size": 2,
    "expert_model_parallel_size": 4,
    "source": "mistralai/Mixtral-8x7B-v0.1",
    "fingerprint": "abc-def",
}
ADAPTER: dict[str, Any] = {
    "architecture": MIXTRAL_8X7B.to_mapping(),
    "iteration": 10,
    "dtype": "float32",
    "lora": LORA.to_mapping(),
    "base": {"fingerprint": "abc-def", "path": "/base"},
    "training": {"seed": 1},
    "data_sha256": None,
}


def write_base(folder: Path, **changes: Any) -> Path:
    """Write everything of a base checkpoint but its weights."""
    (folder / "iter_0000001").mkdir(parents=True)
    (folder / "iter_0000001" / ".metadata").write_bytes(b"never read")
    (folder / LATEST).write_text("1\n")
    write_manifest(folder, "base", **BASE | changes)
    return folder


def write_adapter(folder: Path, **changes: Any) -> Path:
    """Write everything of an adapter checkpoint but its weights."""
    iteration = folder / "iter_0000010"
    iteration.mkdir(parents=True)
    (iteration / ".metadata").write_bytes(b"never read")
    (folder / LATEST).write_text("10\n")
    write_manifest(iteration, "adapter", **ADAPTER | changes)
    return folder


def change(folder: Path, **values: Any) -> None:
    """Change fields of the manifest of a base, or of an adapter's iteration."""
    path = next(iter([*folder.glob(f"iter_*/{MANIFEST_NAME}"), folder / MANIFEST_NAME]))
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_file_is_written_as_documented(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    text = (tmp_path / "base" / MANIFEST_NAME).read_text()
    expected = {"format": 1, "kind": "base", "kit_version": __version__, **BASE}
    assert text == json.dumps(expected, indent=2) + "\n"
    assert read_values(tmp_path / "base") == expected


def test_a_base_and_an_adapter_are_read_back(tmp_path: Path) -> None:
    base = open_checkpoint(write_base(tmp_path / "base"))
    assert isinstance(base.manifest, BaseManifest)
    assert (base.kind, base.iteration, base.architecture) == ("base", 1, MIXTRAL_8X7B)
    assert (base.manifest.dtype, base.manifest.source) == ("bfloat16", BASE["source"])
    adapter = open_checkpoint(write_adapter(tmp_path / "adapter"))
    assert isinstance(adapter.manifest, AdapterManifest)
    assert (adapter.kind, adapter.iteration, adapter.manifest.lora) == ("adapter", 10, LORA)
    assert adapter.manifest.base.path == "/base"
    assert describe_adapter(tmp_path / "adapter" / "iter_0000010").training == {"seed": 1}
    assert describe_adapter(tmp_path / "adapter").chat_template is None
    # A template comes from a model, and may hold anything.
    record = TemplateRecord("tokenizer", "{{ messages }}\r\n\t\x1b[2J\u202e", "{{ tools }}")
    write_adapter(tmp_path / "other", chat_template=record.to_mapping())
    assert describe_adapter(tmp_path / "other").chat_template == record
    assert describe_base(tmp_path / "base").fingerprint == "abc-def"


@pytest.mark.parametrize(
    "changes", [{"text": "{{ 1 }}"}, {"fingerprint": None}, {"name": 3}, {"text": []}, {"name": "a\x1b[2J"}, None]
)
def test_a_damaged_template_of_an_adapter_is_refused(tmp_path: Path, changes: Any) -> None:
    values = "a template" if changes is None else TemplateRecord("mine.jinja", "{{ messages }}").to_mapping() | changes
    write_adapter(tmp_path / "adapter", chat_template=values)
    with pytest.raises(WeightsError, match="chat_template: expected a template's name and texts"):
        describe_adapter(tmp_path / "adapter")


def test_an_iteration_of_full_fine_tuning_is_read_as_one_of_an_adapter_is(tmp_path: Path) -> None:
    """The same values under both kinds; only the checksums of the files must be there for a whole model."""
    record = TemplateRecord("tokenizer", "{{ messages }}", None)
    run = {
        "architecture": MIXTRAL_8X7B.to_mapping(), "iteration": 3, "base": {"fingerprint": "1-2", "path": None},
        "training": {"seed": 2}, "data_sha256": "ab", "tokenizer_files": {"t": "00000002"},
        "state": {"optimizer_steps": 3}, "validation": {}, "chat_template": record.to_mapping(),
    }  # fmt: skip
    files = {"files": {"__0_0.distcp": "0000000f"}}
    for name in ("adapter", "model", "old", "cut"):
        (tmp_path / name).mkdir()
    write_manifest(tmp_path / "adapter", "adapter", lora=LORA.to_mapping(), **run, **files)
    write_manifest(tmp_path / "model", "base", dtype="bfloat16", fingerprint="a-b", source="m", **run, **files)
    adapter, model = (read_checkpoint_manifest(tmp_path / name) for name in ("adapter", "model"))
    assert isinstance(adapter, AdapterManifest) and isinstance(model, TrainedManifest)
    assert (adapter.lora, model.dtype, model.fingerprint, model.source) == (LORA, "bfloat16", "a-b", "m")
    for each in (adapter, model):
        assert (each.architecture, each.iteration, each.base.fingerprint) == (MIXTRAL_8X7B, 3, "1-2")
        assert (each.training, each.data_sha256, each.validation) == ({"seed": 2}, "ab", {})
        assert (each.files, each.tokenizer_files) == ({"__0_0.distcp": 15}, {"t": 2})
        assert (each.state.optimizer_steps, each.chat_template) == (3, record)
    write_manifest(tmp_path / "old", "adapter", lora=LORA.to_mapping(), **run)
    old = read_manifest(tmp_path / "old", AdapterManifest)
    assert files_manifest_of(Checkpoint(tmp_path, 3, tmp_path, old)).files == {}
    write_manifest(tmp_path / "cut", "base", dtype="bfloat16", fingerprint="a-b", **run, files=None)
    with pytest.raises(WeightsError, match="files: expected an object; found nothing"):
        read_manifest(tmp_path / "cut", TrainedManifest)


def test_a_quantized_cache_and_exports_are_read_back(tmp_path: Path) -> None:
    base = {"fingerprint": "abc-def", "tensors": {"a": "0000000f"}}
    write_manifest(tmp_path, "quantised", base=base, tensors={"b": "000000ff"})
    cache = read_manifest(tmp_path, QuantizedCacheManifest)
    assert (cache.base.fingerprint, cache.source_checksums, cache.checksums) == ("abc-def", {"a": 15}, {"b": 255})
    write_manifest(tmp_path, "quantised", base=base, tensors={"b": "no number"})
    with pytest.raises(WeightsError, match=r"tensors\.b: expected a CRC-32"):
        read_manifest(tmp_path, QuantizedCacheManifest)
    for kind in ("peft", "hf"):
        write_manifest(tmp_path, kind, adapter="/adapter", layout="peft")
        assert read_manifest(tmp_path, ExportManifest).adapter == "/adapter"
        assert is_kind(tmp_path, "peft", "hf") and not is_kind(tmp_path, "base")


def verify_it(load: Path, _: Path) -> None:
    from mixtral_run.weights.verify.verify import verify

    verify(VerifyConfig(load=load), Report.silent())


def plan_it(load: Path, _: Path) -> None:
    from mixtral_run.planner.table import planned_gpu, workload_of

    config = PlanConfig(load=load)
    workload_of(config, planned_gpu(config))


def finetune_it(load: Path, other: Path) -> None:
    from mixtral_run.train.preflight import check_training

    config = FinetuneConfig(load=load, save=other / "save", mock_data=True, **ONE_PROCESS)
    check_training(config, 1)


def convert_it_back(load: Path, other: Path) -> None:
    from mixtral_run.weights.convert.to_hf import to_hf

    to_hf(ConvertConfig(from_megatron=load, output_path=other / "out"), Report.silent())


def resume_it(adapter: Path, other: Path) -> None:
    from mixtral_run.train.preflight import check_training

    base = other / "base"
    config = FinetuneConfig(load=base, save=adapter, resume="yes", mock_data=True, **ONE_PROCESS)
    check_training(config, 1)


def generate_with_it(adapter: Path, other: Path) -> None:
    from mixtral_run.train.preflight import check_inference

    check_inference(GenerateConfig(load=other / "base", adapter=adapter, prompt=("a",), **ONE_PROCESS))


def export_it(adapter: Path, other: Path) -> None:
    from mixtral_run.weights.adapter.export import export

    export(ExportConfig(adapter=(str(adapter),), output_path=other / "out"), Report.silent())


OF_A_BASE = (verify_it, plan_it, finetune_it, convert_it_back)
OF_AN_ADAPTER = (verify_it, resume_it, generate_with_it, export_it)
WAYS = [(write_base, each) for each in OF_A_BASE] + [(write_adapter, each) for each in OF_AN_ADAPTER]


@pytest.mark.parametrize(("write", "use"), WAYS, ids=[f"{a.__name__}-{b.__name__}" for a, b in WAYS])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"format": 2, "kit_version": "9.9"},
            ("does not understand", "format 1,", "format 2, written by mixtral-run 9.9", "pip install --upgrade"),
        ),
        ({"format": "1"}, ("format: expected 1; found '1'",)),
        ({"kind": "of the future"}, ("This is not", "unknown kind 'of the future'")),
        ({"kind": ["base"]}, ("kind: expected a text; found a list",)),
        ({"architecture": {"num_layers": True}}, ("architecture.num_layers: expected a whole number", "hidden_size")),
        ({"architecture": None}, ("architecture: expected an object; found nothing",)),
    ],
)
def test_every_verb_refuses_the_same(
    tmp_path: Path,
    write: Callable[[Path], Path],
    use: Callable[[Path, Path], None],
    changes: dict[str, Any],
    words: tuple[str, ...],
) -> None:
    write_base(tmp_path / "base")
    folder = write(tmp_path / "given")
    change(folder, **changes)
    with pytest.raises(MixtralRunError) as caught:
        use(folder, tmp_path)
    assert caught.value.exit_code == WeightsError.exit_code
    for word in (*words, MANIFEST_NAME):
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("write", "use"), [(write_base, describe_base), (write_adapter, describe_adapter)])
@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[" * 6000 + "]" * 6000, "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object; found a list"),
        ("\udcff", "not valid JSON"),
    ],
)
def test_what_is_no_json_object(
    tmp_path: Path, write: Callable[[Path], Path], use: Callable[[Path], object], text: str, word: str
) -> None:
    folder = write(tmp_path / "given")
    change(folder)
    path = next(folder.rglob(MANIFEST_NAME))
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(WeightsError, match=word):
        use(folder)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    lora = {"lora_rank": 0, "lora_alpha": 10**400, "lora_target_modules": ["linear_qkv", "q_proj"]}
    write_adapter(tmp_path / "adapter", lora=lora, iteration=-1, base={"path": 1}, training=[])
    with pytest.raises(WeightsError) as caught:
        describe_adapter(tmp_path / "adapter")
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "iteration",
        "base.fingerprint",
        "base.path",
        "training",
        "lora.lora_rank",
        "lora.lora_alpha",
        "lora.lora_target_modules",
    ]


def test_a_folder_of_another_kind(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    with pytest.raises(WeightsError, match="This is a base checkpoint, not an adapter checkpoint"):
        describe_adapter(tmp_path / "base")
    (tmp_path / "adapter" / MANIFEST_NAME).write_text((next((tmp_path / "adapter").rglob(MANIFEST_NAME))).read_text())
    with pytest.raises(WeightsError, match=r"This is not a base checkpoint\.(.|\n)*an adapter, kind 'adapter'"):
        describe_base(tmp_path / "adapter")


def test_only_format_and_kind_decide_what_may_be_overwritten(tmp_path: Path) -> None:
    assert not is_kind(tmp_path, "base")
    write_manifest(tmp_path, "base")
    assert is_kind(tmp_path, "base")
    change(tmp_path, format=2)
    assert not is_kind(tmp_path, "base")


ESCAPE = "\x1b[2J"


@pytest.mark.parametrize(
    "changes",
    [
        {"kit_version": ESCAPE, "format": 2},
        {"kit_version": "1\nnext: curl"},
        {"architecture": MIXTRAL_8X7B.to_mapping() | {ESCAPE: 1}},
        {"base": {"fingerprint": "\x9b2J", "path": None}},
        {"base": {"fingerprint": "abc", "path": "/\u202egpj"}},
        {"training": {"seed": ["1\n" + ESCAPE]}},
        {ESCAPE: 1},
    ],
)
def test_no_control_character_reaches_the_terminal(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_adapter(tmp_path / "adapter")
    change(tmp_path / "adapter", **changes)
    with pytest.raises(WeightsError, match="holds a control character") as caught:
        describe_adapter(tmp_path / "adapter")
    assert not any(each in str(caught.value) for each in ("\x1b", "\x9b", "\u202e", "curl"))


def test_a_training_setting_may_hold_lines(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", training={"template": "a\n\tb"}, base={"fingerprint": "ä", "path": "/b\u3000c"})
    assert describe_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("lora_rank", {"lora_rank": 10**30}),
        ("lora_alpha", {"lora_alpha": -1}),
        ("lora_alpha", {"lora_alpha": 0}),
        ("lora_dropout", {"lora_dropout": 7}),
        ("lora_dropout", {"lora_dropout": -0.1}),
        ("lora_target_modules", {"lora_target_modules": ["linear_qkv", "linear_qkv"]}),
        ("lora_target_modules", {"lora_target_modules": [{}, []]}),
        ("lora_scaling", {"lora_scaling": "dora"}),
        ("lora_scaling", {"lora_scaling": ["rslora"]}),
        ("lora_rank_experts", {"lora_rank_experts": 0}),
        ("lora_alpha_experts", {"lora_alpha_experts": "2"}),
        ("init_lora", {"init_lora": "random"}),
        ("train_also", {"train_also": ["norms", {}]}),
        ("expert_adapters", {"expert_adapters": "none"}),
        ("expert_adapters", {"expert_adapters": "shared", "init_lora": "pissa"}),
        ("num_layers", {"num_layers": 10**400}),
        ("vocab_size", {"vocab_size": 2**31}),
        ("layernorm_epsilon", {"layernorm_epsilon": -1e-5}),
        ("rotary_base", {"rotary_base": 0}),
    ],
)
def test_numbers_beyond_their_limits_are_refused(tmp_path: Path, field: str, changes: dict[str, Any]) -> None:
    lora = LORA.to_mapping()
    if field.startswith("lora_") or field in LORA_SETTINGS:
        write_adapter(tmp_path / "adapter", lora=lora | changes)
    else:
        write_adapter(tmp_path / "adapter", architecture=MIXTRAL_8X7B.to_mapping() | changes)
    with pytest.raises(WeightsError, match=rf"\.{field}: expected") as caught:
        describe_adapter(tmp_path / "adapter")
    assert len(str(caught.value)) < 700


def test_an_unknown_setting_of_an_adapter_is_refused(tmp_path: Path) -> None:
    """A later version may have trained it in a form that would be computed wrongly."""
    write_adapter(tmp_path / "adapter", lora=LORA.to_mapping() | {"dora": True})
    with pytest.raises(WeightsError, match=r"lora\.dora: unknown"):
        describe_adapter(tmp_path / "adapter")


def test_a_format_of_many_digits_is_shortened(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter")
    change(tmp_path / "adapter", format=10**4000, kit_version="9" * 4000)
    with pytest.raises(WeightsError, match="does not understand") as caught:
        describe_adapter(tmp_path / "adapter")
    assert len(str(caught.value)) < 1000

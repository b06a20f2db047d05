"""Models that people bring: converted and trained as HF and PEFT compute them, or refused with what helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixtral_run.config.verbs.generate import GenerateConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.config.verbs.weights import ConvertConfig, ExportConfig, VerifyConfig
from mixtral_run.errors import ConfigError, WeightsError
from mixtral_run.inference.generate import generate
from mixtral_run.terminal.report import Report
from mixtral_run.train.preflight import check_training
from mixtral_run.trial.logits_parity import compare_logits
from mixtral_run.weights.adapter.export import export
from mixtral_run.weights.convert.to_hf import to_hf
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader
from mixtral_run.weights.verify.verify import verify
from tests.multiprocess.conftest import mixtral_run
from tests.multiprocess.verbs.test_export import write_adapter
from tests.multiprocess.weights.test_convert import convert_quietly
from tests.support.references.model_cases import (
    RELEASED_CONFIGS,
    at_small_width,
    change_config,
    change_weights,
    write_model,
    write_sentencepiece,
)

EXAMPLE = {"instruction": "What is 2+2?", "response": "It is 4."}
TP2 = ("--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2", "--nproc-per-node", "2")


def check_round_trip(model: Path, tmp_path: Path, tp: int) -> dict[str, torch.Tensor]:
    """Convert, compare with the source bit by bit and by proof, and convert back. Return the tensors that came back."""
    fingerprint = convert_quietly(model, tmp_path / "base", tp, 4)
    result = verify(VerifyConfig(load=tmp_path / "base", against=model), Report.silent()).check()
    assert result.comparison is not None and result.comparison.fingerprint == fingerprint
    verify(VerifyConfig(load=tmp_path / "base", proof=True), Report.silent()).check()
    back = to_hf(ConvertConfig(from_megatron=tmp_path / "base", output_path=tmp_path / "back"), Report.silent())
    assert back.fingerprint == fingerprint
    return load_file(next((tmp_path / "back").glob("model-*.safetensors")))


@pytest.mark.parametrize("name", RELEASED_CONFIGS)
def test_released_models_at_small_width(tmp_path: Path, name: str) -> None:
    model = write_model(tmp_path / "model", **at_small_width(RELEASED_CONFIGS[name]))
    source, back = load_file(model / "model.safetensors"), check_round_trip(model, tmp_path, 2)
    assert all(torch.equal(back[tensor], source[tensor]) for tensor in source) and len(back) == len(source)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (model / "config.json").read_text()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_in_fp32_are_cast_and_the_result_is_of_one_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    model = write_model(tmp_path / "model", dtype)
    change_weights(model, lambda tensors: {n: t.float() if "norm" in n else t for n, t in tensors.items()})
    source, back = load_file(model / "model.safetensors"), check_round_trip(model, tmp_path, 2)
    assert all(torch.equal(back[name], source[name].to(dtype)) for name in source)


def test_a_merge_into_weights_that_are_not_stored_as_one_dtype_names_the_way(tmp_path: Path) -> None:
    model = write_model(tmp_path / "hf")
    change_weights(model, lambda tensors: {n: t.float() if "norm" in n else t for n, t in tensors.items()})
    convert_quietly(model, tmp_path / "base", 2, 4)
    write_adapter(tmp_path, tmp_path / "adapter", ("linear_proj",))
    config = ExportConfig(
        adapter=(str(tmp_path / "adapter"),), hf_model_path=model, output_path=tmp_path / "out", merge=True
    )
    with pytest.raises(ConfigError, match="--from-megatron BASE --adapter ADAPTER"):
        export(config, Report.silent())


def test_a_vocabulary_that_tp_does_not_divide_is_padded_with_zeros_and_cut_again(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", vocab_size=103)
    source, back = load_file(model / "model.safetensors"), check_round_trip(model, tmp_path, 2)
    assert torch.equal(back["lm_head.weight"], source["lm_head.weight"])
    folder = tmp_path / "base" / "iter_0000001"
    with Reader(folder) as reader:
        for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert reader.tensors[key].shape == (256, 32)
            assert not reader.rows(key, (), 103, 256).any() and reader.rows(key, (), 0, 103).any()
    args = vars(torch.load(folder / "common.pt", weights_only=False)["args"])
    assert (args["vocab_size"], args["padded_vocab_size"], args["make_vocab_size_divisible_by"]) == (103, 256, 128)
    text = (folder / "run_config.yaml").read_text()
    assert "should_pad_vocab: true" in text and "make_vocab_size_divisible_by: 128" in text


def finetune_config(model: Path, tmp_path: Path, **settings: Any) -> FinetuneConfig:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(EXAMPLE) + "\n")
    layout = {"tensor_model_parallel_size": 1, "expert_model_parallel_size": 1, "nproc_per_node": 1, "device": "cpu"}
    return FinetuneConfig(
        load=model,
        data_path=(str(data),),
        save=tmp_path / "adapter",
        global_batch_size=1,
        train_iters=1,
        **layout,
        **settings,
    )


def test_a_window_is_accepted_where_no_sequence_is_longer(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", sliding_window=64)
    check_training(finetune_config(model, tmp_path, seq_length=64), 1)
    convert_quietly(model, tmp_path / "base", 1, 1)
    for load, said in ((model, "to null"), (tmp_path / "base", "and convert it again")):
        with pytest.raises(ConfigError) as caught:
            check_training(finetune_config(load, tmp_path, seq_length=66), 1)
        (problem,) = caught.value.problems
        assert "--seq-length 66: expected at most 64, the sliding_window" in problem and said in problem
        with pytest.raises(ConfigError, match="exceed the model's window"):
            generate(GenerateConfig(load=load, prompt=("abc",), max_new_tokens=64, device="cpu"))


def test_what_is_not_used_is_reported_once_by_finetune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model", output_router_logits=True, my_own_field=3)
    check_training(finetune_config(model, tmp_path, seq_length=64), 1)
    said = "".join(capsys.readouterr())
    assert said.count("output_router_logits True is not used") == 1 and "not used: my_own_field" in said


def test_convert_refuses_a_tokenizer_model_that_it_cannot_read_and_a_quantized_model(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "tokenizer.json").unlink()
    write_sentencepiece(model / "tokenizer.model", model_type=1)
    with pytest.raises(ConfigError, match=r"tokenizer\.model: a model as Mistral AI's has a byte-pair model"):
        convert_quietly(model, tmp_path / "base", 1, 1)
    change_config(model, quantization_config={"quant_method": "awq", "bits": 4})
    (model / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="quantized with AWQ, 4 bit"):
        convert_quietly(model, tmp_path / "base", 1, 1)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/: as Mixtral 8x22B at small width, with 103 tokens in fp32; base/: at TP2; peft/: trained by PEFT."""
    import peft
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("odd")
    config = at_small_width(RELEASED_CONFIGS["Mixtral-8x22B-Instruct-v0.1"], vocab_size=103)
    model = write_model(root / "model", torch.float32, **{**config, "torch_dtype": "float32"})
    convert_quietly(model, root / "base", 2, 2)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "o_proj"]}
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    trained = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        peft.LoraConfig(**settings, target_parameters=parameters),
    )
    generator = torch.Generator().manual_seed(5)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    trained.save_pretrained(root / "peft")
    return root


def peft_model(odd: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(odd / "model", dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(odd / "peft")).eval()


def test_logits_with_the_adapter_of_peft_and_a_padded_vocabulary_at_tp2(odd: Path) -> None:
    done = mixtral_run(
        "verify", "--load", str(odd / "base"), "--against", str(odd / "model"), "--adapter", str(odd / "peft"),
        "--peft-path", str(odd / "peft"), "--logits-tolerance", "1e-5", *TP2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "logits against HF with the exported adapter (float32, TP2/EP2" in done.stdout


@pytest.mark.parametrize("load", ["base", "model"])
def test_training_starts_from_the_adapter_of_peft_with_the_loss_of_hf(odd: Path, tmp_path: Path, load: str) -> None:
    """The padding of the vocabulary has no part in the loss, and nothing of the adapter is lost."""
    from transformers import AutoTokenizer

    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(EXAMPLE) + "\n")
    done = mixtral_run(
        "finetune", "--load", str(odd / load), "--init-adapter", str(odd / "peft"), "--data-path", str(data),
        "--save", str(tmp_path / "adapter"), "--train-iters", "1", "--seq-length", "64", "--global-batch-size", "1",
        "--lr", "1e-12", "--min-lr", "1e-12", "--device", "cpu", *TP2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rank 8, alpha 12, linear_qkv, linear_proj, linear_fc1, linear_fc2" in done.stdout
    tokenizer = AutoTokenizer.from_pretrained(odd / "model")
    prompt = tokenizer(f"[INST] {EXAMPLE['instruction']} [/INST]")["input_ids"]
    row = [*tokenizer(f"[INST] {EXAMPLE['instruction']} [/INST] {EXAMPLE['response']}")["input_ids"], 2]
    labels = [-100] * len(prompt) + row[len(prompt) :]
    with torch.no_grad():
        expected = float(peft_model(odd)(torch.tensor([row]), labels=torch.tensor([labels])).loss)
    metrics = json.loads((tmp_path / "adapter" / "metrics.jsonl").read_text())
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_generation_with_the_adapter_of_peft_is_that_of_hf(odd: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(odd / "model")
    done = mixtral_run(
        "generate", "--load", str(odd / "base"), "--adapter", str(odd / "peft"), "--prompt", "abc def",
        "--max-new-tokens", "12", "--json", "--device", "cpu", *TP2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tokens = torch.tensor([tokenizer("abc def")["input_ids"]])
    wanted = peft_model(odd).generate(input_ids=tokens, max_new_tokens=12, do_sample=False)[0, tokens.shape[1] :]
    (answer,) = json.loads(done.stdout)
    assert answer["text"] == tokenizer.decode(wanted, skip_special_tokens=True).strip()


def test_logits_are_not_compared_where_transformers_finds_no_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model")
    change_weights(model, lambda tensors: {f"_orig_mod.{name}": each for name, each in tensors.items()})
    check_round_trip(model, tmp_path, 2)
    compare_logits(VerifyConfig(load=tmp_path / "base", against=model))
    assert "logits are not compared" in capsys.readouterr().err

"""The page about a run: hostile texts, files that are missing or odd, and what the commands set."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.results.read_run import read_run
from mixtral_run.results.report_page import ExampleText, report_page
from tests.support.html_page import Page

HOSTILE = "</pre><script>alert('x')</script><img src=x onerror=alert(1)>&amp;\"'\u202e\x1b[2J\x00 $name ${about}"
SHOWN = HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\u001b").replace("\x00", "\\u0000")


def config(**changes: Any) -> FinetuneConfig:
    settings = {"load": Path("base"), "save": Path("adapter"), "data_path": ("a.jsonl",), "train_iters": 4}
    return FinetuneConfig(**(settings | changes))


def summary(**changes: Any) -> dict[str, Any]:
    return {
        "name": "run", "started": "2026-01-01T00:00:00Z", "kit": {"version": "1", "commit": "ab" * 20},
        "data": {"training": "4 examples", "sha256": "0" * 64}, "base": {"fingerprint": "f"}, "last_iteration": 4,
        "train_iters": 4, "tokens_per_second": 1234.5, "peak_memory_gib": [1.25, 2.5], "num_processes": 2,
        "settings": config().to_mapping(),
    } | changes  # fmt: skip


def page_of(folder: Path, document: dict[str, Any], *examples: ExampleText) -> Page:
    (folder / "summary.json").write_text(json.dumps(document))
    page = Page(report_page(read_run(folder), examples, str(folder)))
    page.check_offline_and_inert()
    return page


def test_texts_of_data_and_files_are_shown_and_do_nothing(tmp_path: Path) -> None:
    answer = dict.fromkeys(("place", "prompt", "expected", "text"), HOSTILE)
    for iteration in (0, 4):
        with (tmp_path / "generations.jsonl").open("a") as file:
            file.write(json.dumps({"iteration": iteration, "answers": [answer]}) + "\n")
    document = summary(
        name=HOSTILE, started=HOSTILE, device=HOSTILE, base_precision=HOSTILE, recompute=HOSTILE,
        kit={"version": HOSTILE, "commit": HOSTILE}, data=dict.fromkeys(("training", "validation", "sha256"), HOSTILE),
        base={"fingerprint": HOSTILE}, validation={"lowest_loss": 1.0, "lowest_iteration": HOSTILE},
        settings=config(data_path=(HOSTILE,), run_name=HOSTILE).to_mapping() | {HOSTILE: HOSTILE},
        router={"tokens": [[1, 2]], "dropped_tokens": HOSTILE, "retaken_steps": HOSTILE},
    )  # fmt: skip
    page = page_of(tmp_path, document, ExampleText(HOSTILE, ((HOSTILE, False), (HOSTILE, True))))
    [title], [name], [mark] = page.all("title"), page.all("h1"), [e for e in page.all("mark") if e.text != "marked"]
    assert title.text.startswith(SHOWN) and (name.text, mark.text) == (SHOWN, SHOWN)
    assert [each.text for each in page.all("pre")].count(SHOWN) == 4  # prompt, answer in the data, before, after
    shown = dict(page.values())
    for path in ("data.training", "data.validation", "base.fingerprint", "settings.run_name", "settings.data_path"):
        assert shown[path] == SHOWN, path


def test_attention_in_8_bit_is_named(tmp_path: Path) -> None:
    for precision, shown in (("bf16", "base in fp8, recompute"), ("fp8", "base in fp8, attention in fp8, recompute")):
        page = page_of(tmp_path, summary(base_precision="fp8", attention_precision=precision, recompute="none"))
        assert [shown in each.text for each in page.all("p")].count(True) == 1


@pytest.mark.parametrize(("layers", "shown"), [(None, "recompute full"), (9, "recompute full in 9 layers")])
def test_the_number_of_layers_that_run_again_is_named(tmp_path: Path, layers: int | None, shown: str) -> None:
    page = page_of(tmp_path, summary(recompute="full", recompute_layers=layers))
    assert [each.text.endswith(shown) for each in page.all("p")].count(True) == 1


def test_what_a_resumed_run_changed_is_named(tmp_path: Path) -> None:
    former = [{"iteration": 2, "settings": {"attention_precision": "fp8", "beta": 0.1}}]
    values = summary(base_precision="nf4", attention_precision="bf16", recompute="none", former_settings=former)
    page = page_of(tmp_path, values)
    shown = "base in nf4, attention in bf16 (fp8 until iteration 2), recompute none"
    assert [shown in each.text for each in page.all("p")].count(True) == 1
    assert dict(page.values())["former_settings.0.settings.beta"] == "0.1"
    odd = page_of(tmp_path, {**values, "former_settings": [{"iteration": "x"}]})
    assert not [each for each in odd.all("h3") if "--resume" in each.text]


def test_a_summary_of_nothing_has_a_page(tmp_path: Path) -> None:
    page = page_of(tmp_path, {})
    assert not page.curves() and [each.text for each in page.all("h1")] == [tmp_path.name]


@pytest.mark.parametrize(
    "odd",
    [
        {"losses": 7}, {"validation": [1]}, {"kit": "x"}, {"settings": [1]}, {"data": None},
        {"router": {"tokens": [[]]}},
        {"router": {"tokens": "x"}}, {"peak_memory_gib": "x"}, {"peak_memory_gib": 3}, {"settings": {"lr": "x"}},
        {"base": 1}, {"kit": {"commit": 5}}, {"router": {"tokens": [[1, -1], [True, None]]}},
    ],
    ids=str,
)  # fmt: skip
def test_odd_values_are_left_out(tmp_path: Path, odd: dict[str, Any]) -> None:
    (tmp_path / "generations.jsonl").write_text('{"iteration": 0, "answers": 7}\n{"iteration": 1, "answers": [7]}\n')
    (tmp_path / "router.jsonl").write_text('{"iteration": 1, "of": "training", "drift": "x"}\n')
    assert page_of(tmp_path, summary(**odd)).all("h1")


def test_the_command_continues_the_run_with_its_settings(tmp_path: Path) -> None:
    odd = ("it's, one.jsonl", "two $HOME.jsonl:0.5")
    settings = config(data_path=odd, lr=1.23456789e-4, lora_target_modules=("linear_qkv", "linear_fc1"), report=False)
    page = page_of(tmp_path, summary(settings=settings.to_mapping()))
    command = next(each.text for each in page.all("pre") if "finetune" in each.text)
    words = shlex.split(command.replace("\\\n", ""))
    assert words[:2] == ["mixtral-run", "finetune"] and words[-1] == "--resume"
    assert [words[i + 1] for i, word in enumerate(words) if word == "--data-path"] == list(odd)
    assert words[words.index("--lr") + 1] == "0.000123456789"
    assert words[words.index("--lora-target-modules") + 1] == "linear_qkv,linear_fc1"
    assert "--no-report" in words and "--seq-length" not in words


@pytest.mark.parametrize(("base", "served"), [({"hf_model": "it's $HOME"}, "it's $HOME"), ({}, "HF_MODEL")])
def test_the_export_is_what_is_served(tmp_path: Path, base: dict[str, str], served: str) -> None:
    page = page_of(tmp_path, summary(base=base))
    text = next(each.text for each in page.all("pre") if " serve " in each.text)
    export = next(each.text for each in page.all("pre") if " export " in each.text)
    first, second = (shlex.split(line) for line in text.replace("\\\n", "").splitlines())
    assert first == ["mixtral-run", "serve", "--on", "HOST", "--load", served, "--adapter", shlex.split(export)[-1]]
    assert "--format vllm" in export and second[second.index("--adapter") + 1] == str(tmp_path)


def test_the_shares_of_the_experts_are_those_of_the_counts(tmp_path: Path) -> None:
    tokens = [[10, 30, 60], [50, 25, 25]]
    lines = [(1, [0.0, 0.0]), (2, [0.1, 0.3])]
    text = "".join(json.dumps({"iteration": at, "of": "validation", "drift": drift}) + "\n" for at, drift in lines)
    (tmp_path / "router.jsonl").write_text(text)
    page = page_of(tmp_path, summary(router={"tokens": tokens, "dropped_tokens": 0, "retaken_steps": 2}))
    cells = [
        (each.text, float(each.attributes["data-share"]))
        for each in page.all("text")
        if "data-share" in each.attributes
    ]
    assert cells == [("10.0%", 0.1), ("30.0%", 0.3), ("60.0%", 0.6), ("50.0%", 0.5), ("25.0%", 0.25), ("25.0%", 0.25)]
    assert dict(page.values())["router.choices"] == "100"
    curves = page.curves()
    assert [y for _, y in curves["drift_mean"]] == pytest.approx([0.0, 0.2], abs=1e-3)
    assert [y for _, y in curves["drift_largest"]] == pytest.approx([0.0, 0.3], abs=1e-3)

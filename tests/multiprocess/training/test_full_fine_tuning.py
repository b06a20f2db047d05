"""Full fine-tuning against HF's model with torch's AdamW: losses, norms, weights, a resumed run, and what reads it."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixtral_run.config.verbs.weights import ConvertConfig, VerifyConfig
from mixtral_run.errors import CheckFailed, WeightsError
from mixtral_run.terminal.report import Report
from mixtral_run.train.checkpoints.newest_good import newest_good
from mixtral_run.weights.convert.to_hf import to_hf
from mixtral_run.weights.manifest.describe import describe_trained
from mixtral_run.weights.verify.verify import verify
from tests.multiprocess.conftest import mixtral_run, torchrun
from tests.multiprocess.training.full_worker import AUX, CLIP, DECAY, HALF, LENGTH, RATES, STEPS, rows_of
from tests.support.servers.s3_server import MARKER, content, stored

WORKER = Path(__file__).parent / "full_worker.py"
CASES = ["1-1x1-fp32", "3-1x1-fp32", "4-2x1-fp32", "4-1x2-fp32", "4-2x2-fp32"]
"""PROCESSES-TPxEP-DTYPE. On three processes no weight can be shared out evenly."""


@pytest.fixture(scope="module")
def runs(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with figures.json and the checkpoints of all runs. Runs on four processes continue one on another."""
    folder = tmp_path_factory.mktemp("full")
    half, half_rows = (f"{folder / name}-fp32-half" for name in ("4-2x2", "4-2x2x2"))
    starts = {
        1: ["1x1:fp32", "1x1:bf16"],
        3: ["1x1:fp32"],
        4: [
            "2x1:fp32",
            "1x2:fp32",
            "2x2:fp32",
            f"{half}:2x2:fp32",
            f"{half}:1x4:fp32",
            "2x2:bf16",
            "2x2x1:fp32",
            "2x2x2:fp32",
            f"{half_rows}:1x2x1:fp32",
        ],
    }
    figures: dict[str, Any] = {}
    for count, words in starts.items():
        out = folder / f"on{count}.json"
        torchrun(count, WORKER, str(small_checkpoint), str(out), *words)
        figures |= json.loads(out.read_text())
    (folder / "figures.json").write_text(json.dumps(figures))
    return folder


@pytest.fixture(scope="module")
def figures(runs: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((runs / "figures.json").read_text())
    return found


class Reference:
    """The same training by HF's model, torch's AdamW and torch's clipping: nothing of the kit."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="eager")
        norms = [each for name, each in model.named_parameters() if "norm" in name]
        others = [each for name, each in model.named_parameters() if "norm" not in name]
        groups = [{"params": others, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
        self.figures: list[list[float]] = []
        for step in range(STEPS):
            tokens, counts = rows_of(step)
            optimizer.zero_grad()
            total = 0.0
            for row, count in zip(tokens, counts.tolist(), strict=True):
                output = model(row[None, :-1], output_router_logits=True)
                losses = torch.nn.functional.cross_entropy(output.logits[0], row[1:], reduction="none")
                share = count / int(counts.sum())
                # Tokens after the last one that counts are padding for the routers.
                mask = (torch.arange(LENGTH) < count).long()[None]
                balance = load_balancing_loss_func(output.router_logits, 8, 2, mask)
                loss = share * (losses[:count].mean() + AUX * balance)
                loss.backward()
                total += float(loss.detach())
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            assert float(norm) > CLIP, "clipping must matter"
            for group in optimizer.param_groups:
                group["lr"] = RATES[step]
            optimizer.step()
            self.figures.append([total, float(norm)])
        self.model = model.eval()


@pytest.fixture(scope="module")
def reference(small_hf_model: Path) -> Reference:
    return Reference(small_hf_model)


@pytest.fixture(scope="module")
def exported(runs: Path, small_hf_model: Path) -> dict[str, Path]:
    """The HF model of each run's last checkpoint."""
    found = {}
    for case in CASES:
        found[case] = runs / f"hf-{case}"
        to_hf(ConvertConfig(from_megatron=runs / case, output_path=found[case]), Report.silent())
    return found


@pytest.mark.parametrize("case", CASES)
def test_losses_and_norms_are_those_of_hfs_model(case: str, figures: dict[str, Any], reference: Reference) -> None:
    assert abs(reference.figures[0][0] - reference.figures[-1][0]) > 1e-2
    for (loss, norm), (expected_loss, expected_norm) in zip(figures[case], reference.figures, strict=True):
        assert loss == pytest.approx(expected_loss, abs=2e-5)
        assert norm == pytest.approx(expected_norm, rel=2e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_exported_model_has_the_references_weights_and_logits(
    case: str, exported: dict[str, Path], reference: Reference, small_hf_model: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(exported[case]), dtype=torch.float32, attn_implementation="eager")
    before = AutoModelForCausalLM.from_pretrained(str(small_hf_model), dtype=torch.float32)
    expected, start = dict(reference.model.named_parameters()), dict(before.named_parameters())
    tokens = rows_of(99)[0][:2]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            assert float((expected[name] - start[name]).abs().max()) > 1e-3, f"{name} was not trained"
            assert float((weight - expected[name]).abs().max()) < 2e-4, name
        difference = model(tokens).logits - reference.model(tokens).logits
    assert float(difference.abs().max()) < 5e-3


def test_a_resumed_run_has_the_same_bits(runs: Path, figures: dict[str, Any]) -> None:
    assert figures["4-2x2-fp32-resumed"] == figures["4-2x2-fp32"][HALF:]
    whole, resumed = (_files(runs / name) for name in ("4-2x2-fp32", "4-2x2-fp32-resumed"))
    assert whole == resumed and len(whole) >= 4


def _files(folder: Path) -> dict[str, str]:
    """Checksums of the tensors' files of the last checkpoint."""
    manifest = json.loads((folder / f"iter_{STEPS:07d}/mixtral_run.json").read_text())
    return {name: crc for name, crc in manifest["files"].items() if name.endswith(".distcp")}


def test_a_run_continues_in_another_layout(figures: dict[str, Any]) -> None:
    for (loss, norm), (expected_loss, expected_norm) in zip(
        figures["4-1x4-fp32-resumed"], figures["4-2x2-fp32"][HALF:], strict=True
    ):
        assert loss == pytest.approx(expected_loss, abs=2e-5)
        assert norm == pytest.approx(expected_norm, rel=2e-4)


@pytest.mark.parametrize(("case", "first"), [("4-2x2x2-fp32", 0), ("4-1x2x1-fp32-resumed", HALF)])
def test_half_rows_train_as_whole_rows_do(case: str, first: int, figures: dict[str, Any]) -> None:
    """On two ranks each, and continued with whole rows in another layout."""
    whole = figures["4-2x2x1-fp32"][first:]
    assert len(figures[case]) == len(whole)
    for (loss, norm), (expected_loss, expected_norm) in zip(figures[case], whole, strict=True):
        assert loss == pytest.approx(expected_loss, abs=2e-5)
        assert norm == pytest.approx(expected_norm, rel=2e-4)


def test_in_bf16_the_weights_follow_fp32_masters(runs: Path, figures: dict[str, Any]) -> None:
    """The steps are smaller than the last bit of most weights in bf16, so that these alone would hardly move."""
    for case in ("1-1x1-bf16", "4-2x2-bf16"):
        losses, expected = ([loss for loss, _ in figures[each]] for each in (case, "1-1x1-fp32"))
        assert losses == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("case", ["3-1x1-fp32", "4-2x2-bf16"])
def test_verify_reads_it(case: str, runs: Path) -> None:
    result = verify(VerifyConfig(load=runs / case, proof=True), Report.silent())
    assert (result.kind, result.iteration, result.problems) == ("base", STEPS, ())


def test_a_damaged_iteration_is_named_and_an_older_one_used(runs: Path, tmp_path: Path) -> None:
    """Also with a flipped bit in the optimizer's state, which no reader of the weights sees."""
    folder = tmp_path / "tuned"
    shutil.copytree(runs / "3-1x1-fp32", folder)
    assert newest_good(folder, describe_trained).damaged == ()
    file = folder / f"iter_{STEPS:07d}/__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckFailed) as damaged:
        verify(VerifyConfig(load=folder, proof=True), Report.silent())
    assert [each.split(":")[0] for each in damaged.value.problems] == ["__1_0.distcp"]
    found = newest_good(folder, describe_trained)
    assert found.adapter is not None and found.adapter.iteration == HALF
    assert [each.name for each, _ in found.damaged] == [f"iter_{STEPS:07d}"]


def test_a_folder_of_another_kind_is_not_resumed(small_checkpoint: Path) -> None:
    with pytest.raises(WeightsError, match="This is not a checkpoint of full fine-tuning"):
        describe_trained(small_checkpoint)


def test_the_recorded_fingerprint_is_that_of_the_hf_model(runs: Path, exported: dict[str, Path]) -> None:
    from mixtral_run.weights.hf.fingerprint import fingerprint
    from mixtral_run.weights.hf.hf_weights import open_hf_weights

    manifest = json.loads((runs / f"3-1x1-fp32/iter_{STEPS:07d}/mixtral_run.json").read_text())
    assert manifest["fingerprint"] == fingerprint(open_hf_weights(exported["3-1x1-fp32"]))
    assert load_file(next(exported["3-1x1-fp32"].glob("*.safetensors")))


def test_the_verb_trains_evaluates_saves_in_a_store_and_continues_on_another_machine(
    s3: Any, small_checkpoint: Path, tmp_path: Path
) -> None:
    """On one process after two, where the state was shared among both.

    The first machine is lost before its last checkpoint is whole in the store.
    """
    data = [json.dumps({"instruction": f"What is {n}?", "response": f"The number {n}."}) for n in range(24)]
    (tmp_path / "data.jsonl").write_text("\n".join(data) + "\n")
    words = (
        "pretrain", "--load", str(small_checkpoint), "--data-path", str(tmp_path / "data.jsonl"), "--save",
        "s3://bucket/runs/tuned", "--valid-fraction", "0.2", "--seq-length", "32", "--global-batch-size", "4",
        "--save-interval", "1", "--lr", "1e-3", "--device", "cpu", "--report-prompts", "0", "--resume", "auto",
    )  # fmt: skip
    first = {"MIXTRAL_RUN_STORE_CACHE": str(tmp_path / "first")}
    done = mixtral_run(*words, "--train-iters", "2", "--nproc-per-node", "2", **first)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Full fine-tuning complete: 2 iterations" in done.stdout
    printed = " ".join(done.stdout.split())
    assert "Checkpoints are saved in the background" in printed
    assert re.search(r"saved \S+/iter_0000001 in [0-9.]+ s in the background, which delayed a step", printed), printed
    shutil.rmtree(tmp_path / "first")
    for name in (MARKER, "__1_0.distcp"):
        s3.delete_object(Bucket="bucket", Key=f"runs/tuned/iter_0000002/{name}")
    second = {"MIXTRAL_RUN_STORE_CACHE": str(tmp_path / "second")}
    done = mixtral_run(*words, "--train-iters", "3", "--nproc-per-node", "1", "--keep-last", "1", **second)
    assert done.returncode == 0 and "Resuming from" in done.stdout, done.stdout + done.stderr
    (save,) = (tmp_path / "second/outputs").glob("*/tuned")
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert [each["iteration"] for each in lines] == [1, 2, 3]
    assert [each.name for each in save.glob("iter_*")] == ["iter_0000003"]
    evaluations = [json.loads(line)["loss"] for line in (save / "validation.jsonl").read_text().splitlines()]
    assert evaluations[-1] < evaluations[0] - 0.1
    assert "convert --from-megatron" in (save / "report.html").read_text().replace(" \\\n ", "")
    _check_store(s3, save)


def _check_store(s3: Any, save: Path) -> None:
    """The store has the last checkpoint, whole by its marker, and the run's files; nothing of the ones before."""
    marker = json.loads(content(s3, f"runs/tuned/iter_0000003/{MARKER}"))["files"]
    assert {f"iter_0000003/{each.name}" for each in (save / "iter_0000003").iterdir()} < marker.keys()
    for name, each in marker.items():
        body = content(s3, f"runs/tuned/{name}")
        assert (len(body), f"{zlib.crc32(body):08x}") == (each["size"], each["crc32"])
        assert body == (save / name).read_bytes()
    assert content(s3, "runs/tuned/latest_checkpointed_iteration.txt") == b"3\n"
    assert content(s3, "runs/tuned/metrics.jsonl") == (save / "metrics.jsonl").read_bytes()
    others = ("iter_0000001/", f"iter_0000002/{MARKER}")
    assert not [name for name in stored(s3) if any(each in name for each in others)]

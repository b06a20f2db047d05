"""Tokenization of conversations: the kit's token cache beside `datasets.map` with the same tokenizer, in one run.

    python -m benchmarks.data --examples 100000

Each measurement is a process of its own. `first` tokenizes, `second` is the next start with the same file, `rank` opens
the cache as a rank does and reads an epoch of rows. The rival tokenizes each conversation as one text, without the
spans that are learned, which is less work; its cache is Arrow.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from benchmarks.support.process_memory import measured

PARTS = ("kit-first", "kit-second", "kit-rank", "datasets-first", "datasets-second")
SEQ_LENGTH = 2048


def conversations(count: int) -> Iterator[dict[str, Any]]:
    """Conversations of two turns and about 1.2 kB, of passages of English text in random order."""
    numbers = random.Random(0)
    text = " ".join(" ".join(topics.values()).split())
    for number in range(count):
        parts = []
        for length in (160, 420, 120, 380):
            begin = numbers.randrange(len(text) - 1000)
            parts.append(text[begin : begin + numbers.randint(length // 2, length * 3 // 2)].strip() or "x")
        parts[0] += f" ({number})"
        roles = ("user", "assistant", "user", "assistant")
        yield {"messages": [{"role": role, "content": part} for role, part in zip(roles, parts, strict=True)]}


def write_examples(path: Path, count: int) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for each in conversations(count):
            file.write(json.dumps(each, ensure_ascii=False) + "\n")
    partial.rename(path)


def kit(part: str, folder: Path, data: Path) -> dict[str, Any]:
    from mixtral_run.config.verbs.training import FinetuneConfig
    from mixtral_run.model.architecture import MIXTRAL_8X7B
    from mixtral_run.terminal.report import Report
    from mixtral_run.train.data.samples import batches
    from mixtral_run.train.data.sources import open_data
    from mixtral_run.weights.manifest.describe import BaseDescription

    base = BaseDescription(folder / "base", MIXTRAL_8X7B, "bfloat16", "0-0")
    config = FinetuneConfig(
        load=base.folder,
        save=folder / "adapter",
        data_path=(str(data),),
        seq_length=SEQ_LENGTH,
        pack=part == "kit-rank",
    )
    started = time.perf_counter()
    opened = open_data(config, base, Report(sys.stderr), verify=part != "kit-rank")
    result = {"open_seconds": time.perf_counter() - started}
    if part == "kit-rank":
        started, count = time.perf_counter(), opened.num_samples or 0
        stream = batches(opened.samples, seed=1, micro_batch_size=8, global_batch_size=8)
        for _ in range(count // 8):
            next(stream)
        result |= {"rows": count, "rows_per_second": count / (time.perf_counter() - started)}
    return result


def rival(folder: Path, data: Path) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base" / "tokenizer")
    datasets.disable_progress_bars()
    started = time.perf_counter()
    loaded = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=str(folder / "arrow"))
    read = time.perf_counter()
    options = {"remove_columns": loaded.column_names, "fn_kwargs": {"tokenizer": tokenizer}}
    done = loaded.map(as_token_ids, batched=True, num_proc=cpus(), **options)
    seconds = time.perf_counter() - started
    return {"open_seconds": seconds, "read_seconds": read - started, "tokens": sum(map(len, done[:1000]["input_ids"]))}


def as_token_ids(batch: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    texts = []
    for messages in batch["messages"]:
        turns = zip(messages[::2], messages[1::2], strict=True)
        texts.append("".join(f"[INST] {one['content']} [/INST] {two['content']}</s>" for one, two in turns))
    return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}


def cpus() -> int:
    return len(os.sched_getaffinity(0))


def child(part: str, folder: Path, data: Path) -> None:
    started = time.perf_counter()
    result = kit(part, folder, data) if part.startswith("kit") else rival(folder, data)
    result["seconds"] = time.perf_counter() - started
    result["own_peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="Work folder. Default: a temporary one, removed at the end.")
    parser.add_argument("--tokenizer", type=Path, help="HF tokenizer. Default: Mixtral's, of mistral-common's files.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = arguments.folder or Path(tempfile.mkdtemp(prefix="benchmark-data-"))
    data = work / f"conversations-{arguments.examples}.jsonl"
    if arguments.child:
        child(arguments.child, work, data)
        return
    try:
        prepare(work, data, arguments)
        print(f"{arguments.examples:,} conversations, {data.stat().st_size / 1e9:.2f} GB, {cpus()} CPUs", flush=True)
        for part in arguments.parts:
            words = [sys.executable, "-m", "benchmarks.data", "--examples", str(arguments.examples)]
            found, memory = measured([*words, "--folder", str(work), "--child", part])
            found["peak_gb_of_all"] = memory.peak_resident_bytes / 1e9
            found["anonymous_gb"] = memory.peak_anonymous_bytes / 1e9
            found["cpu_seconds"] = memory.cpu_seconds
            if part.endswith("first"):
                found["examples_per_second"] = arguments.examples / found["open_seconds"]
                found["examples_per_cpu_second"] = arguments.examples / found["cpu_seconds"]
            print(part, json.dumps({name: round(value, 3) for name, value in found.items()}), flush=True)
    finally:
        if arguments.folder is None:
            shutil.rmtree(work, ignore_errors=True)


def prepare(work: Path, data: Path, arguments: argparse.Namespace) -> None:
    """Write the data and the tokenizer, and remove the caches of an earlier run."""
    (work / "base").mkdir(parents=True, exist_ok=True)
    for name in ("arrow", ".mixtral-run-tokens"):
        shutil.rmtree(work / name, ignore_errors=True)
    if not data.exists():
        write_examples(data, arguments.examples)
        # A file that was written just now is read again, in case it changes within the same time stamp.
        time.sleep(3)
    folder = work / "base" / "tokenizer"
    if folder.exists():
        return
    if arguments.tokenizer is not None:
        shutil.copytree(arguments.tokenizer, folder)
        return
    from tests.support.mistral_tokenizers import hf_tokenizer

    hf_tokenizer("v1").save_pretrained(str(folder))


if __name__ == "__main__":
    main()

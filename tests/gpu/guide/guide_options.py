"""Options of the guide's run."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.make_mixtral import add_size_options
from mixtral_run.config.precision import BASE_PRECISIONS
from mixtral_run.config.recompute import RECOMPUTE

STEPS = ("convert", "mock", "real", "generate", "export", "smoke")


def parsed(words: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, help="GPUs to use (default: all), or processes on a CPU (default: 2)")
    parser.add_argument("--layouts", type=layouts, help="such as TP2/EP4,TP1/EP8 (default: by the number of GPUs)")
    parser.add_argument("--only", default=",".join(STEPS), help=f"steps, with commas between: {', '.join(STEPS)}")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"))
    parser.add_argument(
        "--base-precision", choices=BASE_PRECISIONS, help="default: bf16, or fp8 where that is too much"
    )
    parser.add_argument("--recompute", choices=RECOMPUTE, help="default: mock full, as the guide; real by the plan")
    parser.add_argument(
        "--ram-folder", type=Path, default=Path("/dev/shm"), help="a folder in memory, of twice the size"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("guide-run.json"), help="beside it: the steps' output, .log"
    )
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="what no longer fits is left out")
    parser.add_argument("--keep", action="store_true", help="leave model and checkpoint there; the next run takes them")
    parser.add_argument("--micro-batch-size", type=int, default=1)
    for name, iterations, seq, batch in (("mock", 10, 512, 8), ("real", 20, 2048, 64)):
        parser.add_argument(f"--{name}-iterations", type=int, default=iterations)
        parser.add_argument(f"--{name}-seq-length", type=int, default=seq)
        parser.add_argument(f"--{name}-global-batch-size", type=int, default=batch)
    add_size_options(parser, layers=32, hidden_size=4096, ffn_hidden_size=14336)
    options = parser.parse_args(words)
    options.only = options.only.split(",")
    unknown = sorted(set(options.only) - set(STEPS))
    if unknown:
        parser.error(f"--only: expected some of {', '.join(STEPS)}; found {', '.join(unknown)}")
    return options


def layouts(text: str) -> list[tuple[int, int]]:
    found = [re.fullmatch(r"TP(\d+)/EP(\d+)", word) for word in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"expected TP2/EP4 or several of that form, with commas; found {text}")
    return [(int(each[1]), int(each[2])) for each in found if each]


def default_layouts(count: int) -> list[tuple[int, int]]:
    """TP2 as the guide has it, where the experts go over TP ranks as well, and EP alone."""
    ep = math.gcd(count, 8)
    return [(1, ep)] if count % 2 else [(2, min(ep, 4)), (1, ep)]


def name_of(layout: tuple[int, int]) -> str:
    return f"TP{layout[0]}/EP{layout[1]}"


def expected_rate(seq_length: int, layout: tuple[int, int]) -> float:
    """Tokens a second and GPU to reckon the time with, a little below what is hoped for."""
    return (1200 if seq_length <= 512 else 6000) * (0.75 if layout[0] > 1 else 1.0)

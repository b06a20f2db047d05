"""Make the pictures of README.md from real runs on this machine: `python docs/make_pictures.py [NAME …]`.

rehearse: run `mixtral-run rehearse` on a pseudo-terminal and write docs/pictures/rehearse.svg (the terminal, in color)
and docs/pictures/loss.png (the loss plot that the rehearsal writes). Takes about a minute on 2 cores.

finetune: fine-tune the rehearsal's model on a pseudo-terminal, and write docs/pictures/finetune.svg (the live view in
the middle of the run) and docs/pictures/report.png (the page about the run, by headless Chromium). Takes two minutes.

data: check the rehearsal's examples with the tokenizer of its model, and write docs/pictures/data_check.svg.

bootstrap: run `mixtral-run bootstrap` on three throw-away hosts with stand-ins for GPUs and for a large disk, and write
docs/pictures/bootstrap.svg, the live view in the middle of the run. Then one host is cordoned, and
docs/pictures/status.png is the status page of all, by headless Chromium. Needs a Docker engine and takes a few minutes.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from types import MappingProxyType

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from mixtral_run.fleet.testhosts import hosts as testhosts
from mixtral_run.fleet.testhosts.__main__ import inventory
from mixtral_run.fleet.testhosts.disks import with_images
from mixtral_run.fleet.testhosts.hosts import StandIn
from mixtral_run.fleet.testhosts.repository import stop_unless_used
from mixtral_run.trial.random_mixtral import write_random_mixtral
from mixtral_run.trial.sizes import PLAN, tokenizer_texts, write_rehearsal_examples

PICTURES = Path(__file__).parent / "pictures"
WIDTH = 132
FIRST_LINE = "[4/7]"
"""The picture of the rehearsal begins here: the whole run is too long for a README."""
HOSTS = ("gpu-01", "gpu-02", "gpu-03")
GPUS = StandIn(driver="580.95.05")
ROLES = "preflight,nvidia_driver,docker,nvidia_container_toolkit,swap,image,hf_cache,health"
"""All but the acceptance, which measures real GPUs: the image of these hosts is the kit's without torch."""
CORDONED = "gpu-03"
STATUS_WORDS = ("--html", "status.html", "--checkpoints-folder", "/srv/checkpoints")
LARGE_DISK = "mkdir -p /srv/checkpoints && mount -t tmpfs -o size=7T tmpfs /srv/checkpoints"
FINETUNE_WORDS = shlex.split(
    "--load rehearsal/checkpoint --data-path rehearsal/pairs.jsonl --valid-fraction 0.3 --save my-adapter "
    "--seq-length 64 --global-batch-size 8 --micro-batch-size 4 --train-iters 60 --eval-interval 10 --lr 3e-3 "
    "--min-lr 3e-4 --lora-rank 8 --lr-warmup-iters 5 --tensor-model-parallel-size 2 --expert-model-parallel-size 2 "
    "--nproc-per-node 2 --device cpu"
)
FINETUNE_AT, LIVE_LINES = 45, 12
"""The picture of the training is taken at this iteration, and has so many lines."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LIVE_VIEW_AT = "Install the NVIDIA container toolkit"
"""The picture of the live view is taken while this task runs."""
CONTROL = re.compile(r"\x1b\[(\d*)A|\x1b\[2K|\x1b\[\?25[hl]|\r|\n")


def main() -> None:
    """Make the pictures named on the command line, or all."""
    PICTURES.mkdir(exist_ok=True)
    makers = {"rehearse": rehearse, "finetune": finetune, "data": data, "bootstrap": bootstrap}
    for name in sys.argv[1:] or makers:
        makers[name]()


def rehearse() -> None:
    """Run the rehearsal and write its pictures. Raises RuntimeError if the terminal lost a part of the table."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "rehearsal"
        lines = screen(run([sys.executable, "-m", "mixtral_run", "rehearse", "--work-path", "rehearsal"], Path(folder)))
        report = json.loads((work / "report.json").read_text(encoding="utf-8"))
        shutil.copyfile(work / "loss.png", PICTURES / "loss.png")
    lost = [step["name"] for step in report["steps"] if not any(f"│ {step['name']}" in line for line in lines)]
    if lost:
        # Some sandboxes' pseudo-terminals drop output when it comes fast.
        raise RuntimeError(f"The terminal lost these rows of the table: {', '.join(lost)}. Run the script again.")
    start = next(number for number, line in enumerate(lines) if line.startswith(FIRST_LINE))
    draw(lines[start:], PICTURES / "rehearse.svg", "mixtral-run rehearse")


def finetune() -> None:
    """Fine-tune a tiny model, and write the live view and the page about the run."""
    kit = [sys.executable, "-m", "mixtral_run"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([*kit, "rehearse", "--work-path", "rehearsal"], cwd=folder, check=True, capture_output=True)
        output = run([*kit, "finetune", *FINETUNE_WORDS], folder)
        photograph(folder / "my-adapter" / "report.html", "report.png", "1000,1090")
    # Every frame of the live view begins by moving the cursor up.
    end = output.index("\x1b[2K\x1b[1A", output.index(f"{FINETUNE_AT} of"))
    lines = [line for line in screen(output[:end]) if line.strip()]
    draw(lines[-LIVE_LINES:], PICTURES / "finetune.svg", "mixtral-run finetune --load mixtral --data-path my.jsonl …")


def data() -> None:
    """Check the rehearsal's examples and write what a person sees."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_mixtral(
            folder / "mixtral", architecture=PLAN.architecture, dtype=PLAN.dtype, seed=PLAN.seed,
            texts=tokenizer_texts(), num_shards=1, initializer_range=PLAN.initializer_range,
        )  # fmt: skip
        write_rehearsal_examples(folder / "my.jsonl")
        words = ["data", "check", "my.jsonl", "--load", "mixtral", "--seq-length", "48"]
        lines = screen(run([sys.executable, "-m", "mixtral_run", *words], folder))
    draw([line for line in lines if line], PICTURES / "data_check.svg", f"mixtral-run {' '.join(words)}")


def photograph(page: Path, picture: str, size: str) -> None:
    """Write what a browser shows of a page in a window of WIDTH,HEIGHT."""
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={size}"]
    words = [browser, *options, f"--screenshot={PICTURES / picture}", page.as_uri()]
    subprocess.run(words, check=True, capture_output=True)


def bootstrap() -> None:
    """Bootstrap throw-away hosts and write the pictures of live view and status page. The hosts are removed."""
    kit = [sys.executable, "-m", "mixtral_run"]
    try:
        for name in HOSTS:
            testhosts.start(name, standin=GPUS, disk=with_images("bookworm")).shell(LARGE_DISK)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "hosts.json").write_text(json.dumps(inventory(list(HOSTS))), encoding="utf-8")
            # Hosts of these names have new keys each time: the state of an earlier run is none of theirs.
            state = {"XDG_STATE_HOME": str(folder / "state")}
            words = ["-i", "hosts.json", "-e", '{"health_watch": true}', "--tags", ROLES]
            output = run([*kit, "bootstrap", *words], folder, state)
            for words in (["cordon", CORDONED, "--reason", "a fan is replaced"], ["status", *STATUS_WORDS]):
                subprocess.run([*kit, *words], cwd=folder, env={**os.environ, **state}, check=False)
            photograph(folder / "status.html", "status.png", "1300,640")
    finally:
        for name in HOSTS:
            testhosts.remove(name)
        stop_unless_used()
    title = " ".join(["mixtral-run bootstrap", *(f"ubuntu@{host}" for host in HOSTS)])
    draw(live_view(output), PICTURES / "bootstrap.svg", title)


def live_view(output: str) -> list[str]:
    """Return the lines of the terminal when the last host reached LIVE_VIEW_AT, and the table at the end."""
    # Every frame of the live view begins by moving the cursor up.
    frame_end = output.index("\x1b[2K\x1b[1A", output.rindex(LIVE_VIEW_AT))
    end = screen(output)
    table = next(number for number, line in enumerate(end) if line.split()[:2] == ["host", "result"])
    return [*(line for line in screen(output[:frame_end]) if line.strip()), "", *end[table : table + len(HOSTS) + 3]]


def draw(lines: list[str], picture: Path, title: str) -> None:
    """Write the lines as an SVG of a terminal, in the colors that they carry."""
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True, color_system="truecolor")
    for line in lines:
        console.print(Text.from_ansi(line), no_wrap=True, overflow="ellipsis")
    text = console.export_svg(title=title, theme=MONOKAI)
    # No font is loaded from elsewhere: the browser's monospace font serves.
    text = re.sub(r"@font-face \{.*?\}\s*", "", text, flags=re.DOTALL)
    picture.write_text(text, encoding="utf-8")


def run(command: list[str], folder: Path, variables: Mapping[str, str] = MappingProxyType({})) -> str:
    """Run the command in `folder` on a pseudo-terminal of WIDTH columns and return all that it printed.

    Raises subprocess.CalledProcessError if the command fails.
    """
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(WIDTH), "LINES": "50", "TERM": "xterm-256color", **variables}
    process = subprocess.Popen(command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    output = b""
    try:
        while chunk := os.read(ours, 65536):
            output += chunk
    except OSError:
        pass  # Linux reports the closed terminal of a process that has ended as an error.
    os.close(ours)
    if process.wait() != 0:
        print(output.decode(), file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, command)
    return output.decode()


def screen(output: str) -> list[str]:
    """Return the lines that the terminal shows at the end; progress bars move the cursor up and erase lines."""
    lines, row, end = [""], 0, 0
    for control in CONTROL.finditer(output):
        lines[row] += output[end : control.start()]
        end = control.end()
        if control[0] == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif control[0].endswith("A"):
            row = max(0, row - int(control[1] or 1))
        elif control[0].endswith("2K"):
            lines[row] = ""
    lines[row] += output[end:]
    return lines


if __name__ == "__main__":
    main()

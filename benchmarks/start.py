"""The start of a command, by process and by what it does: samples of the main thread's stack, every 20 ms.

    python -m benchmarks.start [--every 0.02] [--from-scratch] -- finetune --load … --mock-data --train-iters 3 …
    python -m benchmarks.start --trace torch._dynamo -- …      # prints what imports a module, in each process

The command runs as `python -m mixtral_run`, first with an empty folder for compiled kernels (--from-scratch: only so),
again with what the first run compiled. Every Python process of it samples itself from its first moment on. A row is a
stretch of one activity: the function of the kit that was called last, and the package that it imports, if it does.
Stretches shorter than 0.1 s are summed up as "…". The lines that the command printed follow, with their times. Kernels
that a run compiled are listed by name: with kernels of compile_kernels in MIXTRAL_RUN_KERNELS there should be none. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHORT = 0.1
SAMPLER = """
import os, sys, threading, time
def _sample(main, file, every):
    with open(file, "w", buffering=1) as out:
        out.write(repr((time.time(), "process " + " ".join(sys.orig_argv[1:6]))) + "\\n")
        last = None
        while True:
            frame, kit, imported = sys._current_frames().get(main), "", ""
            stack = []
            while frame is not None:
                stack.append(frame)
                frame = frame.f_back
            for frame in reversed(stack):
                name, code = frame.f_globals.get("__name__", ""), frame.f_code
                if name.startswith("mixtral_run"):
                    if code.co_name != "<module>":
                        kit, imported = name.removeprefix("mixtral_run.") + ":" + code.co_name, ""
                    elif not imported:
                        imported = "mixtral_run"
                elif code.co_name == "<module>" and name.split(".")[0] not in ("__main__", "runpy"):
                    imported = name.split(".")[0] if imported in ("", "mixtral_run") else imported
            doing = kit + (" import " + imported if imported else "")
            if doing != last:
                out.write(repr((time.time(), doing)) + "\\n")
                last = doing
            time.sleep(every)
class _Tracer:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ.get("MIXTRAL_RUN_BENCH_TRACE"):
            import traceback
            sys.stderr.write(f"[{os.getpid()}] imports {name}\\n" + "".join(traceback.format_stack()[-30:]))
        return None
sys.meta_path.insert(0, _Tracer())
def _start():
    file = os.path.join(os.environ["MIXTRAL_RUN_BENCH_START"], f"{os.getpid()}-{time.time():.3f}.txt")
    arguments = (threading.main_thread().ident, file, float(os.environ["MIXTRAL_RUN_BENCH_EVERY"]))
    threading.Thread(target=_sample, args=arguments, daemon=True).start()
_start()
os.register_at_fork(after_in_child=_start)
"""


def compiled_in(cache: Path) -> dict[str, str]:
    """Return the name of what each entry of a cache of Triton's holds."""
    entries = {}
    for each in cache.iterdir() if cache.is_dir() else ():
        files = sorted(each.glob("*.json")) or sorted(each.glob("*.so")) if each.is_dir() else [each]
        names = [file.name for file in files if not file.name.startswith("__grp__")]
        entries[each.name] = names[0] if names else "?"
    return entries


def measured(words: list[str], cache: Path, every: float, trace: str) -> dict[str, Any]:
    """Run the command and return the stretches of each of its processes, in seconds since its start."""
    import ast

    with tempfile.TemporaryDirectory() as own:
        folder = Path(own)
        (folder / "sitecustomize.py").write_text(SAMPLER)
        (folder / "samples").mkdir()
        environment = {
            **os.environ,
            "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}",
            "MIXTRAL_RUN_BENCH_START": str(folder / "samples"),
            "MIXTRAL_RUN_BENCH_EVERY": str(every),
            "TRITON_CACHE_DIR": str(cache),
            "MIXTRAL_RUN_BENCH_TRACE": trace,
        }
        known = {*compiled_in(cache), *compiled_in(Path(os.environ.get("MIXTRAL_RUN_KERNELS") or own))}
        began = time.time()
        argv = [sys.executable, "-m", "mixtral_run", *words]
        lines = []
        with subprocess.Popen(
            argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as run:
            assert run.stdout is not None
            lines += [(time.time() - began, line.rstrip()) for line in run.stdout]
        seconds = time.time() - began
        if run.returncode or trace:
            print("\n".join(line for _, line in lines)[-20000:], file=sys.stderr)
        new = sorted(name for entry, name in compiled_in(cache).items() if entry not in known)
        processes = {}
        for file in sorted((folder / "samples").iterdir(), key=lambda each: each.stem.split("-")[1]):
            samples = [ast.literal_eval(line) for line in file.read_text().splitlines()]
            ends = [at for at, _ in samples[1:]] + [file.stat().st_mtime]
            stretches = [
                (at - began, max(end - at, 0.0), doing) for (at, doing), end in zip(samples, ends, strict=True)
            ]
            processes[f"{file.stem.split('-')[0]} {samples[0][1]}"] = stretches[1:]
    found = {"seconds": seconds, "returncode": run.returncode, "lines": lines}
    return {**found, "processes": processes, "compiled": new}


def show(found: dict[str, Any]) -> None:
    print(f"== {found['seconds']:.1f} s, exit code {found['returncode']}")
    for name, stretches in found["processes"].items():
        if not stretches:
            continue
        print(f"  {name[:110]}")
        for long, group in itertools.groupby(stretches, key=lambda each: each[1] >= SHORT):
            rows = list(group)
            if long:
                for at, seconds, doing in rows:
                    print(f"    {at:6.2f} +{seconds:5.2f}  {doing}")
            elif sum(seconds for _, seconds, _ in rows) >= SHORT:
                print(f"    {rows[0][0]:6.2f} +{sum(seconds for _, seconds, _ in rows):5.2f}  …")
    for at, line in found["lines"]:
        print(f"    {at:6.2f}  | {line[:150]}")
    print(f"  compiled in this run: {len(found['compiled'])} {' '.join(found['compiled'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=float, default=0.02, help="seconds between samples")
    parser.add_argument("--from-scratch", action="store_true", help="only the first start")
    parser.add_argument("--cache", type=Path, help="folder of compiled kernels; default: a new one")
    parser.add_argument("--trace", default="", metavar="MODULE", help="print what imports this module")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="-- and the command; SAVE is replaced by a new folder")
    arguments = parser.parse_args()
    words = [each for each in arguments.words if each != "--"]
    results = []
    with tempfile.TemporaryDirectory() as own:
        for number in range(1 if arguments.from_scratch else 2):
            called = [each.replace("SAVE", f"{own}/save-{number}") for each in words]
            results.append(measured(called, arguments.cache or Path(own) / "kernels", arguments.every, arguments.trace))
            show(results[-1])
    print(json.dumps([{"seconds": each["seconds"], "returncode": each["returncode"]} for each in results]))


if __name__ == "__main__":
    main()

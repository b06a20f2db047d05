"""Settings of `serve`. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.config.fields import COMPARISON, OUTPUT, PROCESSES, PROMPTS, setting
from mixtral_run.config.verbs.generate import InferenceConfig

VLLM, SGLANG = ENGINES = ("vllm", "sglang")
IMAGES = {VLLM: "vllm/vllm-openai:v0.33.0", SGLANG: "lmsysorg/sglang:v0.5.23"}
"""Default image of each engine."""
TIE_BF16, TIE_FP32 = 0.25, 0.001
"""Difference of logits below which two engines may choose differently, by the dtype of the model."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig(InferenceConfig):
    """A server with OpenAI's API in a container on a host, or the proof of one that runs anywhere."""

    engine: str = setting(VLLM, help="Engine that serves.", choices=ENGINES, section=PROCESSES)
    engine_image: str | None = setting(
        None,
        help=f"Image of the engine. It is pulled if the host lacks it. Default: {IMAGES[VLLM]} or {IMAGES[SGLANG]}.",
        section=PROCESSES,
    )
    engine_arg: tuple[str, ...] = setting(
        (),
        help="Further word for the engine's command line, such as --engine-arg=--max-model-len=8192. May be repeated.",
        section=PROCESSES,
    )
    tensor_parallel: int | None = setting(
        None, help="GPUs of the engine. Default: all of the host.", minimum=1, section=PROCESSES
    )
    port: int = setting(8000, help="Port of the host.", minimum=1, maximum=65535, section=PROCESSES)
    bind: str = setting(
        "127.0.0.1",
        help="Address of the host on which the port is open. 0.0.0.0 opens it to the network, without a password "
        "unless the engine has one.",
        section=PROCESSES,
    )
    base_name: str = setting(
        "base", help="Name of the base in requests. Empty with --prove: do not ask.", section=PROMPTS
    )
    adapter_name: str = setting("adapter", help="Name of the adapter in requests.", section=PROMPTS)
    wait_minutes: int = setting(
        30, help="Minutes to wait until the server answers. It loads the model meanwhile.", minimum=1, section=PROCESSES
    )
    dry_run: bool = setting(False, help="Print the container's command, and start nothing.", section=OUTPUT)
    prove: str | None = setting(
        None,
        help="URL of a running server with OpenAI's API: compare its greedy answers with those of generate, for the "
        "base and the adapter, and start nothing.",
        section=COMPARISON,
    )
    instruction: tuple[str, ...] = setting(
        (), help="With --prove: instruction to ask. May be repeated. Default: eight of the kit's.", section=COMPARISON
    )
    max_new_tokens: int = setting(
        16,
        help="With --prove: tokens of each answer to compare.",
        minimum=1,
        section=COMPARISON,
    )
    logits_tolerance: float | None = setting(
        None,
        help="With --prove: where the server chose another token, largest difference of the two tokens' logits, by the "
        "model loaded here, at which both count as equally good. Log probabilities that the server reports may differ "
        f"by as much.  [default: {TIE_BF16} in bf16, where it is a ratio of 1.28 of the probabilities; {TIE_FP32} in "
        "fp32]",
        minimum=0,
        section=COMPARISON,
    )
    api_key_file: Path | None = setting(
        None, help="With --prove: file that holds the key that the server asks for.", section=COMPARISON
    )

    def problems(self) -> list[str]:
        found = super().problems()
        if self.prove is not None and not re.match(r"https?://[^/]", self.prove):
            found.append(f"--prove: expected a URL such as http://127.0.0.1:8000; found {self.prove!r}")
        if not re.fullmatch(r"[0-9a-fA-F.:]+|localhost", self.bind):
            found.append(f"--bind: expected an IP address; found {self.bind!r}")
        if self.engine_image is not None and not re.fullmatch(r"[A-Za-z0-9][\w./:@-]*", self.engine_image):
            found.append(f"--engine-image: expected the name of an image; found {self.engine_image!r}")
        names = (("--base-name", self.base_name), ("--adapter-name", self.adapter_name))
        for flag, name in names if self.prove is None else ():
            if not re.fullmatch(r"[A-Za-z0-9][\w./-]*", name):
                found.append(f"{flag}: expected letters, digits, '.', '_', '/' and '-'; found {name!r}")
        if self.base_name == self.adapter_name:
            found.append(f"--base-name and --adapter-name: expected two names; found {self.base_name!r} twice")
        if self.prove is not None and self.dry_run:
            found.append("--dry-run and --prove: expected one of them; found both")
        return found

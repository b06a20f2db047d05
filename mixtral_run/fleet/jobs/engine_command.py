"""The command line of a serving engine, and what an adapter must be for it. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mixtral_run.config.verbs.serve import SGLANG, VLLM, ServeConfig
from mixtral_run.errors import ConfigError, WeightsError

PORT_INSIDE = 8000
RANK_STEPS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank that vLLM takes (vllm/config/lora.py)."""
EXPERT_MODULES = ("w1", "w2", "w3")


def max_rank(rank: int) -> int:
    """Return the smallest step of --max-lora-rank for a rank. Raises ConfigError above the largest."""
    step = next((each for each in RANK_STEPS if each >= rank), None)
    if step is None:
        raise ConfigError(
            "The adapter's rank is too large for the engine.",
            expected=f"at most {RANK_STEPS[-1]}",
            found=f"{rank}",
            next_command="mixtral-run export --merge, and serve the merged model",
        )
    return step


def read_adapter_config(text: str, where: str) -> int:
    """Return the rank of an adapter by its adapter_config.json. Raises WeightsError if no engine serves it rightly."""
    try:
        config = json.loads(text)
    except ValueError as error:
        raise WeightsError("The adapter's config is not JSON.", where=where, found=str(error)) from error
    problems = _problems(config) if isinstance(config, dict) else ["expected a JSON object"]
    if problems:
        raise WeightsError(
            "The adapter cannot be served as it is.",
            where=where,
            problems=problems,
            expected="one pair of matrices for each w1, w2 and w3 of every expert",
            next_command="mixtral-run export --adapter CHECKPOINT --format vllm --output-path FOLDER; or --merge",
        )
    return int(config["r"])


def _problems(config: Mapping[str, Any]) -> list[str]:
    found = []
    if config.get("target_parameters"):
        found.append(
            "target_parameters: the experts are stacked (peft-fused); vLLM reads the rows of a stacked Mixtral adapter "
            "in the order of gpt-oss, gate and up in turn, and answers wrongly without an error"
        )
    for name, why in (("use_dora", "DoRA"), ("rank_pattern", "several ranks"), ("alpha_pattern", "several alphas")):
        if config.get(name):
            found.append(f"{name}: engines do not serve adapters with {why}")
    if config.get("peft_type", "LORA") != "LORA":
        found.append(f"peft_type: expected LORA; found {config['peft_type']!r}")
    modules = config.get("target_modules")
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        found.append(f"r: expected a whole number, 1 or more; found {rank!r}")
    if isinstance(modules, list):
        names = {str(each).rpartition(".")[2] for each in modules}
        missing = [each for each in EXPERT_MODULES if each not in names]
        if missing and len(missing) < len(EXPERT_MODULES):
            found.append(
                f"target_modules: vLLM wants all of w1, w2 and w3 of an expert; {', '.join(missing)} is missing"
            )
    return found


def engine_entrypoint(engine: str) -> tuple[str, ...]:
    """Return the options that select the program of the image: releases differ in their entry points."""
    return ("--entrypoint", {VLLM: "vllm", SGLANG: "python3"}[engine])


def engine_words(config: ServeConfig, load: str, adapter: str | None, rank: int | None, num_gpus: int) -> list[str]:
    """Return the words after the program.

    Args:
        config: the settings.
        load, adapter: as the container sees them.
        rank: of the adapter.
        num_gpus: of the host.
    """
    parallel = str(config.tensor_parallel or max(num_gpus, 1))
    common = ["--host", "0.0.0.0", "--port", str(PORT_INSIDE), "--served-model-name", config.base_name]
    if config.engine == VLLM:
        words = ["serve", load, *common, "--tensor-parallel-size", parallel]
        if adapter is not None and rank is not None:
            words += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(max_rank(rank))]
            words += ["--lora-modules", f"{config.adapter_name}={adapter}"]
    else:
        words = ["-m", "sglang.launch_server", "--model-path", load, *common, "--tp", parallel]
        if adapter is not None and rank is not None:
            words += ["--enable-lora", "--max-loras-per-batch", "1", "--max-lora-rank", str(rank)]
            words += ["--lora-paths", f"{config.adapter_name}={adapter}"]
    return [*words, *config.engine_arg]

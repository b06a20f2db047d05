"""lm-eval's tasks on a loaded model. The package lm_eval is imported here only, where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mixtral_run.config.verbs.evaluate import EvaluateConfig
from mixtral_run.errors import ConfigError
from mixtral_run.inference.continuation import Sampling, continue_rows
from mixtral_run.inference.decode import Decoding
from mixtral_run.inference.session import Session, as_model, models_of
from mixtral_run.inference.shared_prefix import PrefixMemory
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.terminal.report import Report

_MOST_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of a task's setting for the number of tokens to generate, the most important one first."""


def run_tasks(config: EvaluateConfig, session: Session, model: MixtralModel, report: Report) -> dict[str, Any]:
    """Run the tasks on the base, and on the base with the adapter. All ranks must call.

    Every rank goes through the same requests, because the ranks compute each pass together.

    Returns:
        Results by model, task and metric; nothing on other processes than the first of a machine. Raises ConfigError
        for a task that lm-eval does not have.
    """
    manager = TaskManager(include_path=str(config.tasks_path) if config.tasks_path is not None else None)
    unknown = sorted(set(config.tasks) - set(manager.all_tasks))
    if unknown:
        raise ConfigError(
            "lm-eval has no such task.", found=", ".join(unknown), next_command="lm_eval ls tasks, which lists them"
        )
    found: dict[str, Any] = {}
    for name in models_of(session):
        # Standard output belongs to --json.
        with as_model(name, model), redirect_stdout(None), torch.inference_mode():
            results = simple_evaluate(
                model=HarnessModel(config, session, model),
                tasks=list(config.tasks),
                task_manager=manager,
                limit=config.tasks_limit,
                bootstrap_iters=0,
                log_samples=False,
            )
        if results is None:
            # lm-eval gives the results to the first process of a machine only, whatever the model's rank says.
            continue
        found[name] = {
            task: {metric: value for metric, value in values.items() if isinstance(value, (int, float))}
            for task, values in results["results"].items()
        }
    if found:
        names = list(found)
        rows = [
            (task, metric, *(f"{found[name][task][metric]:.4f}" for name in names))
            for task, values in found[names[0]].items()
            for metric in values
        ]
        report.table(("task", "metric", *names), rows, title="lm-eval")
    return found


class HarnessModel(TemplateLM):
    """The loaded model as lm-eval calls it."""

    def __init__(self, config: EvaluateConfig, session: Session, model: MixtralModel) -> None:
        super().__init__()
        self._config, self._session, self._model = config, session, model
        self._memory = PrefixMemory()
        self._tokenizer = session.tokenizer
        self._length = session.base.architecture.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        return int(self._tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return int(self._tokenizer.bos_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text. None: with the tokens that the tokenizer adds, unless the text begins with them."""
        if add_special_tokens is None:
            begin = self._tokenizer.bos_token
            add_special_tokens = not (isinstance(begin, str) and string.startswith(begin))
        return list(self._tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return for each continuation the sum of its tokens' log probabilities, and True if it is the greedy one."""
        found: list[tuple[float, bool]] = []
        for first in range(0, len(requests), self._config.batch_size):
            part = requests[first : first + self._config.batch_size]
            found += self._scores([(context, continuation) for _, context, continuation in part])
        return found

    def _scores(self, part: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        device = self._model.mesh.device
        rows = [(context + continuation)[-self._length - 1 :] for context, continuation in part]
        longest = max(len(row) for row in rows) - 1
        # Padding follows every token that is scored, and attention looks back only.
        tokens = torch.full((len(rows), longest), self.eot_token_id, dtype=torch.int64, device=device)
        for number, row in enumerate(rows):
            tokens[number, : len(row) - 1] = torch.tensor(row[:-1], device=device)
        logits = self._model.logits(tokens)
        found = []
        for number, (row, (_, continuation)) in enumerate(zip(rows, part, strict=True)):
            end, count = len(row) - 1, min(len(continuation), len(row) - 1)
            scores = logits[number, end - count : end].float().log_softmax(-1)
            wanted = torch.tensor(row[len(row) - count :], dtype=torch.int64, device=device)
            score = scores.gather(-1, wanted[:, None]).sum()
            found.append((float(score), bool((scores.argmax(-1) == wanted).all())))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log probability of each whole text."""
        del disable_tqdm
        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(parts)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return a continuation of each context, up to one of its stop texts."""
        del disable_tqdm
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else until
        # As lm-eval's own models read these settings (lm_eval/models/utils.py, normalize_gen_kwargs).
        samples = settings.get("do_sample")
        temperature = float(settings.get("temperature", 1.0 if samples else 0.0)) if samples is not False else 0.0
        given = (settings.get(name) for name in _MOST_TOKENS)
        most = int(next((value for value in given if value is not None), self._config.max_new_tokens))
        most = min(most, self._length - 1)
        row = self.tok_encode(context)[-(self._length - most) :]
        sampling = Sampling(most, temperature, float(settings.get("top_p", 1.0)), self._config.seed)
        decoding = None if self._config.cuda_graphs else Decoding
        output = continue_rows(self._model, [row], {self.eot_token_id}, sampling, None, decoding, memory=self._memory)[
            0
        ]
        text = str(self._tokenizer.decode(output, skip_special_tokens=True))
        for each in until:
            text = text.split(each)[0] if each else text
        return text

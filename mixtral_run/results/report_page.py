"""The page about a run: one HTML file that loads nothing from elsewhere. All texts of data and files are escaped."""

from __future__ import annotations

import importlib.resources
import shlex
import string
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from mixtral_run.config.fields import flag_of
from mixtral_run.config.former_settings import FORMER_SETTINGS, FormerSettings, from_values, with_former
from mixtral_run.config.launch import layout_name
from mixtral_run.config.verbs.align import AlignConfig
from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.config.verbs.training import FinetuneConfig, RunConfig
from mixtral_run.errors import ConfigError
from mixtral_run.results.read_run import RunData, curve, mapping, number, numbers
from mixtral_run.results.report_router import router_section
from mixtral_run.results.svg import Series, escaped, line_chart

MOST_CHARACTERS = 2000
"""Longest text of a piece of an example or of an answer; the middle of a longer one is left out."""


@dataclass(frozen=True)
class ExampleText:
    """An example of the training data as text. parts: each with True if its tokens are learned."""

    place: str
    parts: tuple[tuple[str, bool], ...]


_KINDS: dict[type[RunConfig], str] = {
    FinetuneConfig: "LoRA run",
    AlignConfig: "LoRA run",
    PretrainConfig: "full fine-tuning",
}


def report_page(data: RunData, examples: Sequence[ExampleText], best_adapter: str) -> str:
    """Return the page.

    Args:
        data: the run, with its summary.
        examples: of the training data.
        best_adapter: path of the adapter, or of the model of full fine-tuning, that the commands use.
    """
    summary, name = data.summary, str(data.summary.get("name", data.folder.name))
    kit = mapping(summary.get("kit"))
    commit = (
        f", commit {str(kit['commit'])[:12]}{' with changes' if kit.get('modified') else ''}"
        if kit.get("commit")
        else ""
    )
    about = f"{_state(summary)} · started {summary.get('started')} · mixtral-run {kit.get('version')}{commit}"
    sections = [
        _tiles(summary),
        _curves(data),
        router_section(data),
        _generations(data),
        _data_section(summary, examples),
        _settings(mapping(summary.get("settings")), from_values(summary.get(FORMER_SETTINGS))),
        _commands(summary, best_adapter),
    ]
    template = string.Template(
        importlib.resources.files("mixtral_run.results").joinpath("report.html").read_text("utf-8")
    )
    kind = _KINDS[_config_class(mapping(summary.get("settings")))]
    return template.substitute(
        title=escaped(f"{name} – {kind}"), name=escaped(name), about=escaped(about), sections="\n".join(sections)
    )


def _state(summary: dict[str, Any]) -> str:
    last, whole = summary.get("last_iteration"), summary.get("train_iters")
    if summary.get("stopped_early"):
        return f"Stopped early at iteration {last} of {whole}"
    return (
        f"Complete: {last} iteration{'s' * (last != 1)}"
        if last == whole
        else f"Stopped on request at iteration {last} of {whole}"
    )


def _tiles(summary: dict[str, Any]) -> str:
    losses, validation = mapping(summary.get("losses")), mapping(summary.get("validation"))
    cells = [
        ("Loss, first → last", [_value("losses.first_loss", losses, ".4g"), _value("losses.last_loss", losses, ".4g")]),
        (
            "Validation loss, first → last",
            [_value("validation.first_loss", validation, ".4g"), _value("validation.last_loss", validation, ".4g")],
        ),
        (
            f"Lowest validation loss, at iteration {escaped(validation.get('lowest_iteration'))}",
            [_value("validation.lowest_loss", validation, ".4g")],
        ),
        *_preference_tiles(mapping(summary.get("preferences"))),
        ("Tokens/s in the median iteration", [_value("tokens_per_second", summary, ",.0f")]),
        ("TFLOP/s per process", [_value("tflops_per_process", summary, ".3g")]),
        ("Seconds per iteration", [_value("seconds_per_iteration", summary, ".3g")]),
        ("GiB on the fullest process", [_peak(summary)]),
        ("Seconds of training", [_value("seconds", summary, ",.1f")]),
        ("Seconds of loading", [_value("load_seconds", summary, ",.1f")]),
    ]
    tiles = "".join(
        f'<div class="card tile"><b>{" → ".join(values)}</b><span>{label}</span></div>'
        for label, values in cells
        if all(values)
    )
    sizes: tuple[Any, Any] = summary.get("tensor_model_parallel_size"), summary.get("expert_model_parallel_size")
    # Summaries of earlier versions have no CP and no chunks.
    context, chunks = (int(number(summary.get(name)) or 1) for name in ("context_parallel_size", "expert_chunks"))
    former = from_values(summary.get(FORMER_SETTINGS))
    attention = with_former("attention_precision", str(summary.get("attention_precision")), former)
    layout = (
        f"{summary.get('num_processes')} × {summary.get('device')}, {layout_name(*sizes, context)}, "
        f"base in {with_former('base_precision', str(summary.get('base_precision')), former)}, "
        + (f"attention in {attention}, " if "fp8" in attention else "")
        + f"recompute {summary.get('recompute')}"
        + (f" in {again} layers" if (again := int(number(summary.get("recompute_layers")) or 0)) else "")
        + (f", experts in {chunks} chunks" if chunks > 1 else "")
    )
    return f'<div class="tiles">{tiles}</div>\n<p class="quiet">{escaped(layout)}</p>'


def _preference_tiles(preferences: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Return a tile for each figure of a run on preferences, of its last iteration or its last evaluation."""
    return [
        (f"{title}, {kind}", [_value(f"preferences.{kind}.rewards/{name}", mapping(preferences.get(kind)), ".4g")])
        for title, name in (("Pairs in the right order", "accuracies"), ("Margin of the rewards", "margins"))
        for kind in ("training", "validation")
    ]


def _value(path: str, values: dict[str, Any], form: str) -> str:
    """Return a number of summary.json as it is shown; an empty text if there is none."""
    found = number(values.get(path.rpartition(".")[2]))
    return "" if found is None else f'<span data-of="{path}">{found:{form}}</span>'


def _peak(summary: dict[str, Any]) -> str:
    peaks = numbers(summary.get("peak_memory_gib"))
    return f'<span data-of="peak_memory_gib">{max(peaks):.2f}</span>' if peaks else ""


def _curves(data: RunData) -> str:
    losses = [
        Series("loss", curve(data.metrics, "loss"), "a"),
        Series("validation_loss", curve(data.validation, "loss"), "b", marked=True),
    ]
    charts = [
        _chart("Loss", losses, ("training", "validation") if losses[1].points else ()),
        *_preference_charts(data),
        *(
            _chart(title, [Series(name, curve(data.metrics, name), style)], may_be_log=may_be_log)
            for title, name, style, may_be_log in (
                ("Learning rate", "learning_rate", "c", False),
                ("Tokens/s", "tokens_per_second", "d", False),
                ("Peak memory, GiB", "peak_memory_gib", "b", False),
                ("Gradient norm", "grad_norm", "c", True),
            )
        ),
    ]
    return f'<h2>Curves</h2><div class="charts">{"".join(charts)}</div>'


def _preference_charts(data: RunData) -> list[str]:
    """Return the charts of a run on preferences: rewards, margins and accuracies. Other runs have none of these."""
    rewards = [
        Series(f"rewards/{name}", curve(data.metrics, f"rewards/{name}"), style)
        for name, style in (("chosen", "a"), ("rejected", "b"))
    ]
    found = [_chart("Rewards", rewards, ("chosen", "rejected"), may_be_log=False)] if rewards[0].points else []
    for title, name in (("Margin of the rewards", "margins"), ("Share of pairs in the right order", "accuracies")):
        series = [
            Series(f"rewards/{name}", curve(data.metrics, f"rewards/{name}"), "a"),
            Series(f"validation_rewards/{name}", curve(data.validation, f"rewards/{name}"), "b", marked=True),
        ]
        names = ("training", "validation") if series[1].points else ()
        found.append(_chart(title, series, names, may_be_log=False))
    return found


def _chart(title: str, series: Sequence[Series], names: Sequence[str] = (), *, may_be_log: bool = True) -> str:
    drawing = line_chart(series, f"{title} by iteration", may_be_log=may_be_log)
    if not drawing:
        return ""
    legend = "".join(
        f'<span><i class="{each.style}"></i>{escaped(name)}</span>'
        for each, name in zip(series, names, strict=bool(names))
    )
    return f'<div class="card"><h3>{escaped(title)}</h3><div class="legend">{legend}</div>{drawing}</div>'


def _generations(data: RunData) -> str:
    """Return the answers before the first iteration and after the last one, prompt by prompt."""
    if not data.generations:
        return ""
    first, last = data.generations[0], data.generations[-1]
    by_prompt: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for line in [first] if first is last else [first, last]:
        for answer in _dicts(line.get("answers")):
            by_prompt.setdefault(str(answer.get("prompt")), []).append((line["iteration"], answer))
    cards = []
    for prompt, answers in by_prompt.items():
        texts = [
            ("Answer in the data", answers[0][1].get("expected")),
            *(
                (f"Generated after iteration {iteration}" if iteration else "Generated by the base", answer.get("text"))
                for iteration, answer in answers
            ),
        ]
        shown = "".join(f"<div><h3>{escaped(head)}</h3><pre>{_cut(text)}</pre></div>" for head, text in texts)
        cards.append(
            f'<div class="card stack"><h3>Prompt, {escaped(answers[0][1].get("place"))}</h3>'
            f'<pre>{_cut(prompt)}</pre><div class="answers">{shown}</div></div>'
        )
    note = "Greedy, at most --report-tokens tokens each."
    return f'<h2>Generations on the validation set</h2><p class="quiet">{note}</p>{"".join(cards)}'


def _dicts(values: object) -> list[dict[str, Any]]:
    return [each for each in values if isinstance(each, dict)] if isinstance(values, list) else []


def _cut(text: object) -> str:
    """Return a text for the page, without the middle if it is long."""
    whole = str(text)
    if len(whole) <= MOST_CHARACTERS:
        return escaped(whole)
    half = MOST_CHARACTERS // 2
    left_out = f" … {len(whole) - 2 * half:,} characters … "
    return escaped(whole[:half] + left_out + whole[-half:])


def _data_section(summary: dict[str, Any], examples: Sequence[ExampleText]) -> str:
    data, base = mapping(summary.get("data")), mapping(summary.get("base"))
    rows = [
        ("Training", "data.training", data.get("training")),
        ("Validation", "data.validation", data.get("validation")),
        ("SHA-256 of --data-path", "data.sha256", data.get("sha256")),
        ("Fingerprint of the base", "base.fingerprint", base.get("fingerprint")),
        ("HF model of the base", "base.hf_model", base.get("hf_model")),
    ]
    shown = "".join(
        f"<div><h3>{escaped(each.place)}</h3><pre>"
        + "".join(f"<mark>{_cut(text)}</mark>" if learned else _cut(text) for text, learned in each.parts)
        + "</pre></div>"
        for each in examples
    )
    note = '<p class="quiet">What is <mark>marked</mark> counts in the loss; the rest is context.</p>' if shown else ""
    table = _table((title, path, value) for title, path, value in rows if value is not None)
    return f'<h2>Data</h2><div class="card">{table}</div>{note}<div class="answers">{shown}</div>'


def _table(rows: Iterable[tuple[str, str, object]]) -> str:
    cells = "".join(
        f'<tr><th scope="row">{escaped(title)}</th><td data-of="{escaped(path)}">{escaped(_shown(value))}</td></tr>'
        for title, path, value in rows
    )
    return f"<table>{cells}</table>"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None else str(value)


def _settings(settings: dict[str, Any], former: Sequence[FormerSettings]) -> str:
    defaults = {item.name: item.default for item in fields(_config_class(settings)) if item.default is not MISSING}
    rows = [(f"--{name.replace('_', '-')}", f"settings.{name}", value) for name, value in settings.items()]
    is_default = {
        f"settings.{name}": name in defaults and _plain(defaults[name]) == value for name, value in settings.items()
    }
    given = _table(row for row in rows if not is_default[row[1]])
    others = _table(row for row in rows if is_default[row[1]])
    before = _table(
        (f"{flag_of(name)} until iteration {each.iteration:,}", f"{FORMER_SETTINGS}.{number}.settings.{name}", value)
        for number, each in enumerate(former)
        for name, value in each.settings.items()
    )
    changed = f"<h3>Before --resume changed them</h3>{before}" if former else ""
    return (
        f'<h2>Settings</h2><div class="card">{given}{changed}'
        f"<details><summary>Settings with their default</summary>{others}</details></div>"
    )


def _config_class(settings: dict[str, Any]) -> type[RunConfig]:
    """Return the settings of the verb of a run: only those of align have a method, those of pretrain an optimizer."""
    if "offload_optimizer" in settings:
        return PretrainConfig
    return AlignConfig if "method" in settings else FinetuneConfig


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value) if hasattr(value, "parts") else value


def _commands(summary: dict[str, Any], best_adapter: str) -> str:
    """Return the commands that continue the run, export its adapter, serve it and talk to it."""
    try:
        settings = mapping(summary.get("settings"))
        config = _config_class(settings).from_mapping(settings)
    except ConfigError:
        return ""  # the settings of another version of the kit
    names = {item.name for item in fields(config)} - {"resume"}
    again = _command([f"mixtral-run {config.VERB}", *config.flags(names), "--resume"])
    if isinstance(config, PretrainConfig):
        return _command_section({_CONTINUE: again, **_commands_of_model(shlex.quote(best_adapter))})
    adapter = ["--adapter", shlex.quote(best_adapter)]
    model = ["--load", shlex.quote(str(config.load)), *adapter]
    served = shlex.quote(str(mapping(summary.get("base")).get("hf_model") or "HF_MODEL"))
    commands = {
        _CONTINUE: again,
        "Export the adapter, for PEFT, vLLM and SGLang": (
            _command(["mixtral-run export", *adapter, "--format", "vllm", "--output-path", "peft-adapter"])
        ),
        "Serve the export on a host, where both folders are, and prove that it answers as this adapter does": (
            _command(["mixtral-run serve", "--on", "HOST", "--load", served, "--adapter", "peft-adapter"])
            + "\n"
            + _command(["mixtral-run serve", "--prove", "http://127.0.0.1:8000", *model])
        ),
        "Talk to the adapter, or ask it once": (
            _command(["mixtral-run chat", *model])
            + "\n"
            + _command(["mixtral-run generate", *model, "--instruction", "'Your question'"])
        ),
    }
    return _command_section(commands)


_CONTINUE = "Continue this run (a complete one with a larger --train-iters or --epochs)"


def _commands_of_model(model: str) -> dict[str, str]:
    """Return the commands that use a model of full fine-tuning. model: its folder, quoted for a shell."""
    return {
        "Convert the model to HF's format, for vLLM, SGLang and Transformers": _command(
            ["mixtral-run convert", "--from-megatron", model, "--output-path", "hf-model"]
        ),
        "Talk to the model, or ask it once": (
            _command(["mixtral-run chat", "--load", model])
            + "\n"
            + _command(["mixtral-run generate", "--load", model, "--instruction", "'Your question'"])
        ),
        "Fine-tune it further with LoRA": _command(
            ["mixtral-run finetune", "--load", model, "--data-path", "my.jsonl", "--save", "adapter"]
        ),
    }


def _command_section(commands: dict[str, str]) -> str:
    shown = "".join(f"<h3>{escaped(title)}</h3><pre>{escaped(command)}</pre>" for title, command in commands.items())
    return f'<h2>Commands</h2><div class="card">{shown}</div>'


def _command(words: Sequence[str]) -> str:
    """Return a command for a shell, with each flag on a line of its own."""
    return "".join(f" \\\n  {word}" if word.startswith("--") else f" {word}" for word in words).lstrip()

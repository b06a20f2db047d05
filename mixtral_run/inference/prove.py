"""`serve --prove URL`: the greedy answers of a server are those of `generate`, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixtral_run.config.verbs.serve import ServeConfig
from mixtral_run.errors import CheckFailed, ConfigError
from mixtral_run.inference.continuation import Sampling, continue_rows
from mixtral_run.inference.decode import Decoding
from mixtral_run.inference.openai_client import OpenAIClient, Refused
from mixtral_run.inference.session import ADAPTER, BASE, Session, as_model, models_of, open_session
from mixtral_run.inference.text_stream import printable, text_of
from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.reading.example import USER, Message
from mixtral_run.train.preflight import check_inference

PROMPTS = (
    "Name the three states of matter.", "What is 7 times 8?", "Write a haiku about the sea.", "Say bread in German.",
    "List four colors.", "Explain rain to a child.", "Give an antonym of 'cold'.", "Who wrote Faust?",
)  # fmt: skip
_NO_IDS = (400, 404, 405, 415, 422)
"""HTTP errors of servers that do not take token ids, or not the further fields."""


@dataclass(frozen=True)
class Expected:
    """A prompt and what `generate` answers. row, output: token ids; the output without the token that ends it."""

    prompt: str
    row: tuple[int, ...]
    output: tuple[int, ...]


def check_proof(config: ServeConfig) -> None:
    """Check the model, and that the server is there and knows the names. Raises an error with all problems."""
    check_inference(config, "serve")
    names = OpenAIClient(str(config.prove), _key(config)).models()
    wanted = [name for name in _names(config).values() if name]
    missing = [name for name in wanted if names is not None and name not in names]
    if missing or not wanted:
        raise ConfigError(
            "The server has no model of that name." if missing else "There is nothing to compare.",
            where=str(config.prove),
            expected=", ".join(missing) or "--base-name or --adapter-name",
            found=", ".join(names or []) or "none",
            next_command="--base-name and --adapter-name NAME; an empty --base-name leaves the base out",
        )


def prove(config: ServeConfig) -> None:
    """Generate the answers, ask the server for its own, and compare. All ranks must call. Raises CheckFailed."""
    session = open_session(config)
    prompts = config.instruction or PROMPTS
    rows = [session.template.prompt([Message(USER, text)]) for text in prompts]
    session.check_rows(rows, config.max_new_tokens)
    sampling = Sampling(config.max_new_tokens, 0.0, 1.0, config.seed)
    decoding = None if config.cuda_graphs else Decoding
    expected: dict[str, list[Expected]] = {}
    with open_mesh(config) as mesh:
        report = Report() if mesh.is_first else Report.silent()
        is_first = mesh.is_first
        for warning in session.warnings:
            report.warn(warning)
        model = session.load(config, mesh, report)
        for name in models_of(session):
            with as_model(name, model):
                outputs = [
                    continue_rows(model, [row], session.template.stop_ids, sampling, None, decoding)[0] for row in rows
                ]
            expected[name] = [
                Expected(prompt, tuple(row), _without_end(output, session))
                for prompt, row, output in zip(prompts, rows, outputs, strict=True)
            ]
    if is_first:
        compare(config, session, expected, report)


def compare(config: ServeConfig, session: Session, expected: dict[str, list[Expected]], report: Report) -> None:
    """Ask the server and compare. One process calls. Raises CheckFailed with every prompt whose answer differs."""
    client = OpenAIClient(str(config.prove), _key(config))
    problems = []
    compared = 0
    for name, each in expected.items():
        served = _names(config)[name]
        if not served:
            continue
        differing = [text for item in each if (text := _difference(client, served, item, config, session)) is not None]
        problems += [f"{served}: {text}" for text in differing]
        compared += len(each)
        report.say(f"  {served}: {len(each) - len(differing)} of {len(each)} answers are equal")
    if problems:
        raise CheckFailed(
            "The server does not answer as generate does.",
            where=str(config.prove),
            problems=problems,
            expected=f"the same first {config.max_new_tokens} greedy tokens",
            next_command="compare what is served with --load and --adapter. A late difference in one answer may be a "
            "tie of bf16: a smaller --max-new-tokens tells",
        )
    report.done(f"The server answers as generate does: {compared} answers of up to {config.max_new_tokens} tokens")


def _difference(client: OpenAIClient, served: str, item: Expected, config: ServeConfig, session: Session) -> str | None:
    """Return where the server's answer differs; None if it is equal."""
    try:
        found = client.complete(served, list(item.row), config.max_new_tokens, return_token_ids=True)
    except Refused as error:
        if error.status not in _NO_IDS:
            raise
        found = client.complete(served, _as_text(item.row, session), config.max_new_tokens)
    where = f"prompt {item.prompt!r}"
    if found.tokens is not None:
        tokens = _without_end(list(found.tokens), session)
        if tokens == item.output:
            return None
        at = _first_difference(tokens, item.output)
        ours, theirs = (_token(each, at, session) for each in (item.output, tokens))
        return f"{where}: token {at + 1}: generate has {ours}, the server {theirs}"
    ours = text_of(list(item.output), session.tokenizer, ())
    text = found.text.strip()
    if text == ours:
        return None
    at = _first_difference(text, ours)
    return f"{where}: character {at + 1}: generate has {_part(ours, at)}, the server {_part(text, at)}"


def _as_text(row: Sequence[int], session: Session) -> str:
    """Return a prompt as the text from which a server makes the same ids. Raises ConfigError if there is none."""
    tokenizer = session.tokenizer
    text = str(tokenizer.decode(list(row[1:]) if row[0] == tokenizer.bos_token_id else list(row)))
    if list(tokenizer.encode(text)) != list(row):
        raise ConfigError(
            "The server takes no token ids, and this chat template's prompts cannot be given as a text.",
            expected="a server that takes prompts as token ids, such as vLLM's",
        )
    return text


def _without_end(output: Sequence[int], session: Session) -> tuple[int, ...]:
    ends = bool(output) and output[-1] in session.template.stop_ids
    return tuple(output[:-1] if ends else output)


def _first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _token(tokens: Sequence[int], at: int, session: Session) -> str:
    if at >= len(tokens):
        return "the end"
    return f"{tokens[at]} ({session.tokenizer.convert_ids_to_tokens(tokens[at])!r})"


def _part(text: str, at: int) -> str:
    return repr(printable(text[at : at + 20])) if at < len(text) else "the end"


def _names(config: ServeConfig) -> dict[str, str]:
    """Return the server's names for the models that are compared. Empty: not asked."""
    names = {BASE: config.base_name}
    return names | {ADAPTER: config.adapter_name} if config.adapter is not None else names


def _key(config: ServeConfig) -> str | None:
    if config.api_key_file is None:
        return None
    try:
        return config.api_key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("The key cannot be read.", where=str(config.api_key_file), found=str(error)) from error

"""`serve --prove URL`: the greedy answers of a server are those of `generate`, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from mixtral_run.config.verbs.serve import ServeConfig
from mixtral_run.errors import CheckFailed, ConfigError
from mixtral_run.inference.channel import Channel
from mixtral_run.inference.continuation import Sampling, continue_rows
from mixtral_run.inference.decode import Decoding
from mixtral_run.inference.judge import judge, score, tolerance
from mixtral_run.inference.openai_client import Completion, OpenAIClient, Refused
from mixtral_run.inference.session import ADAPTER, BASE, Session, as_model, models_of, open_session
from mixtral_run.inference.text_stream import REPLACEMENT, printable, text_of
from mixtral_run.model.mixtral import MixtralModel
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
class Verdict:
    """The comparison of one answer.

    difference: where it first differs, None if it is equal. problems: why it is not the model's answer; none if it
    differs only where tokens are equally good. logprob: largest difference of log probabilities, None if the server
    reports none.
    """

    difference: str | None = None
    problems: tuple[str, ...] = ()
    logprob: float | None = None


def check_proof(config: ServeConfig) -> None:
    """Check the model, and that the server is there and knows the names. Raises an error with all problems."""
    check_inference(config, "serve")
    # Some servers list nothing, as `transformers serve` does of a folder, and answer all the same.
    names = OpenAIClient(str(config.prove), _key(config)).models() or None
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
    """Ask the server for its answers, generate the same ones, and compare. All ranks must call. Raises CheckFailed."""
    session = open_session(config)
    prompts = config.instruction or PROMPTS
    rows = [session.template.prompt([Message(USER, text)]) for text in prompts]
    session.check_rows(rows, config.max_new_tokens)
    verdicts: dict[str, list[Verdict]] = {}
    with open_mesh(config) as mesh:
        report = Report() if mesh.is_first else Report.silent()
        for warning in session.warnings:
            report.warn(warning)
        # The server is asked first: what is wrong with it is reported before a large model is loaded.
        served = _served(config, session, rows, Channel(mesh), is_first=mesh.is_first)
        model = session.load(config, mesh, report)
        for name, completions in served.items():
            with as_model(name, model):
                verdicts[name] = [
                    _verdict(config, session, model, row, completion)
                    for row, completion in zip(rows, completions, strict=True)
                ]
        limit = tolerance(config, model)
    if mesh.is_first:
        _conclude(config, prompts, verdicts, limit, report)


def _served(
    config: ServeConfig, session: Session, rows: Sequence[Sequence[int]], channel: Channel, *, is_first: bool
) -> dict[str, list[Completion]]:
    """Return the server's completions by model. The first rank asks; all ranks must call."""
    if not is_first:
        return {name: [_completion(each) for each in answers] for name, answers in channel.receive().items()}
    client = OpenAIClient(str(config.prove), _key(config))
    found = {
        name: [_ask(client, served, row, config, session) for row in rows]
        for name in models_of(session)
        if (served := _names(config)[name])
    }
    channel.send({name: [asdict(each) for each in answers] for name, answers in found.items()})
    return found


def _completion(values: dict[str, object]) -> Completion:
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Completion(**values | lists)  # type: ignore[arg-type]


def _ask(client: OpenAIClient, served: str, row: Sequence[int], config: ServeConfig, session: Session) -> Completion:
    """Return the server's completion of a prompt, with its tokens if they can be known."""
    try:
        found = client.complete(served, list(row), config.max_new_tokens, return_token_ids=True, logprobs=1)
    except Refused as error:
        if error.status not in _NO_IDS:
            raise
        found = client.complete(served, _as_text(row, session), config.max_new_tokens)
    if found.tokens is None:
        return replace(found, logprobs=None)
    if any(each >= len(session.tokenizer) for each in found.tokens):
        raise CheckFailed(
            "The server's answer has a token that the model does not have.",
            where=f"{config.prove}, model {served}",
            expected=f"ids below {len(session.tokenizer)}",
            found=f"{max(found.tokens)}",
            next_command="compare what is served with --load",
        )
    ends = bool(found.tokens) and found.tokens[-1] in session.template.stop_ids
    return replace(found, tokens=found.tokens[:-1], ended=True) if ends else found


def _verdict(
    config: ServeConfig, session: Session, model: MixtralModel, row: Sequence[int], served: Completion
) -> Verdict:
    """Generate the answer to a prompt and compare the server's with it. All ranks must call."""
    stop_ids = session.template.stop_ids
    sampling = Sampling(config.max_new_tokens, 0.0, 1.0, config.seed)
    output = continue_rows(model, [row], stop_ids, sampling, None, None if config.cuda_graphs else Decoding)[0]
    difference = _difference(output, served, session)
    if difference is None and served.logprobs is None:
        return Verdict()
    readings = [served.tokens] if served.tokens is not None else _readings(served.text, row, session)
    if not readings:
        return Verdict(difference, problems=(str(difference),))
    limit = tolerance(config, model)
    judged = [
        (
            # A text that is shorter than asked for has been ended, even if the server reports nothing of the kind.
            judge(scores, served.logprobs, limit, ended=served.ended or len(tokens) < config.max_new_tokens),
            scores,
            tokens,
        )
        for tokens in readings
        for scores in [score(model, row, tokens, stop_ids)]
    ]
    judgement, scores, tokens = min(judged, key=lambda each: each[0].largest_gap)
    problems = []
    if difference is not None:
        difference = f"{difference}; the logits differ by {judgement.largest_gap:.2g}"
    if difference is not None and judgement.gap is not None:
        at, gap = judgement.gap
        here, there = (_token(each, at, session) for each in (scores.best, tokens))
        found = f"token {at + 1}: generate has {here}, the server {there}; the logits differ by {gap:.2g}"
        problems.append(found if served.tokens is not None else difference)
    if judgement.logprob is not None and served.logprobs is not None:
        at = judgement.logprob
        here, there = (f"{each[at]:.4g}" for each in (scores.logprobs, served.logprobs))
        problems.append(f"token {at + 1}: the log probability is {here} for generate, {there} for the server")
    return Verdict(difference, tuple(problems), judgement.largest_logprob)


def _difference(output: Sequence[int], served: Completion, session: Session) -> str | None:
    """Return where the server's answer first differs from generated tokens; None if it is equal."""
    stop_ids = session.template.stop_ids
    if served.tokens is not None:
        ours = tuple(output[:-1] if output and output[-1] in stop_ids else output)
        if served.tokens == ours:
            return None
        at = _first_difference(served.tokens, ours)
        here, there = (_token(each, at, session) for each in (ours, served.tokens))
        return f"token {at + 1}: generate has {here}, the server {there}"
    ours_text, text = text_of(output, session.tokenizer, stop_ids), served.text.strip()
    if text == ours_text:
        return None
    at = _first_difference(text, ours_text)
    return f"character {at + 1}: generate has {_part(ours_text, at)}, the server {_part(text, at)}"


def _conclude(
    config: ServeConfig, prompts: Sequence[str], verdicts: dict[str, list[Verdict]], limit: float, report: Report
) -> None:
    """Report the comparison. Raises CheckFailed with every answer that is not the model's."""
    problems: list[str] = []
    num_ties = 0
    for name, each in verdicts.items():
        served = _names(config)[name]
        logprobs = [verdict.logprob for verdict in each if verdict.logprob is not None]
        more = f"; log probabilities differ by at most {max(logprobs):.2g}" if logprobs else ""
        num_equal = sum(verdict.difference is None for verdict in each)
        report.say(f"  {served}: {num_equal} of {len(each)} answers are equal{more}")
        for prompt, verdict in zip(prompts, each, strict=True):
            where = f"{served}: prompt {prompt!r}"
            problems += [f"{where}: {problem}" for problem in verdict.problems]
            if verdict.difference is not None and not verdict.problems:
                num_ties += 1
                report.warn(f"{where}: {verdict.difference}: both count as equally good (--logits-tolerance {limit:g})")
    if problems:
        raise CheckFailed(
            "The server does not answer as generate does.",
            where=str(config.prove),
            problems=problems,
            expected=f"the same first {config.max_new_tokens} greedy tokens, apart from tokens whose logits differ by "
            f"at most {limit:g}; log probabilities, if the server reports them, within {limit:g}",
            next_command="compare what is served, and in which precision, with --load and --adapter",
        )
    num_answers = sum(map(len, verdicts.values()))
    but = f", {num_ties} of them up to tokens that are equally good" if num_ties else ""
    report.done(
        f"The server answers as generate does: {num_answers} answers of up to {config.max_new_tokens} tokens{but}"
    )


def _readings(text: str, row: Sequence[int], session: Session) -> list[tuple[int, ...]]:
    """Return the tokens that an answer known as text may have: none if it holds bytes that are no characters.

    A server may leave out the blank before the answer.
    """
    if REPLACEMENT in text:
        return []
    prompt, found = _decoded(row, session), []
    for each in dict.fromkeys((text, " " + text.lstrip())):
        ids = list(session.tokenizer.encode(prompt + each))
        if ids[: len(row)] == list(row):
            found.append(tuple(ids[len(row) :]))
    return found


def _as_text(row: Sequence[int], session: Session) -> str:
    """Return a prompt as the text from which a server makes the same ids. Raises ConfigError if there is none."""
    text = _decoded(row, session)
    if list(session.tokenizer.encode(text)) != list(row):
        raise ConfigError(
            "The server takes no token ids, and this chat template's prompts cannot be given as a text.",
            expected="a server that takes prompts as token ids, such as vLLM's",
        )
    return text


def _decoded(row: Sequence[int], session: Session) -> str:
    """Return the text of a prompt without the token that every text begins with."""
    return str(session.tokenizer.decode(list(row[1:]) if row[0] == session.tokenizer.bos_token_id else list(row)))


def _first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _token(tokens: Sequence[int], at: int, session: Session) -> str:
    if at >= len(tokens) or tokens[at] in session.template.stop_ids:
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

"""Generation: one pass over the prompts, then one pass for each new token (decode.py)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mixtral_run.config.generate import GenerateConfig
from mixtral_run.errors import ConfigError
from mixtral_run.inference.decode import Decoding, decoding_of
from mixtral_run.launch.stop_request import StopRequest, stop_requests
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh, open_mesh
from mixtral_run.report import Report
from mixtral_run.train.data.reading.example import USER, Message
from mixtral_run.train.data.templates.chat_template import ChatTemplate
from mixtral_run.train.data.templates.open_template import open_chat_template, template_of_adapter
from mixtral_run.train.data.templates.prompt import check_token_ids, load_tokenizer
from mixtral_run.train.load_model import load_for_inference
from mixtral_run.train.model_limits import length_problems
from mixtral_run.weights.adapter.given_adapter import PeftDescription, describe_given_adapter
from mixtral_run.weights.io.files import write_atomically
from mixtral_run.weights.manifest.adapter_files import report_without_checksums
from mixtral_run.weights.manifest.describe import check_adapter_fits, describe_base


@dataclass(frozen=True)
class Answer:
    """A prompt and the generated text. finished: generation ended with a token that ends a turn."""

    prompt: str
    text: str
    num_tokens: int
    finished: bool


@dataclass(frozen=True)
class Sampling:
    """Settings for choosing the next token. temperature 0: greedy; top_p: nucleus sampling (Holtzman et al. 2019)."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


def generate(config: GenerateConfig) -> None:
    """Load the model, generate a text for every prompt, and print the texts. All ranks must call."""
    base = describe_base(config.load)
    adapter = describe_given_adapter(config.adapter, base.architecture) if config.adapter is not None else None
    if adapter is not None:
        check_adapter_fits(adapter, base)
    tokenizer = load_tokenizer(base.tokenizer)
    recorded = adapter.chat_template if adapter is not None else None
    template, warnings = (
        (open_chat_template(config.chat_template, tokenizer), [])
        if config.adapter is None
        else template_of_adapter(config.chat_template, recorded, tokenizer, config.adapter)
    )
    texts, rows = _prompts(config, tokenizer, template)
    check_token_ids(tokenizer, max(max(row) for row in rows), base.architecture.vocab_size, base.tokenizer)
    longest = max(len(row) for row in rows) + config.max_new_tokens
    if longest > base.architecture.max_position_embeddings:
        raise ConfigError(
            "A prompt and its generated tokens exceed the model's positions.",
            expected=f"at most {base.architecture.max_position_embeddings} tokens",
            found=f"{longest} tokens",
            next_command="a smaller --max-new-tokens, or a shorter prompt",
        )
    too_long = length_problems("a prompt and --max-new-tokens, together", longest, base)
    if too_long:
        raise ConfigError("A prompt and its generated tokens exceed the model's window.", problems=too_long)
    with open_mesh(config) as mesh:
        report = _report(config, mesh)
        for warning in warnings:
            report.warn(warning)
        if len(texts) > len(config.prompt):
            report.say(f"Chat template: {template.describe()}")
        started = time.perf_counter()
        if adapter is not None and not isinstance(adapter, PeftDescription):
            report_without_checksums(adapter.files, adapter.folder, report)
        model = load_for_inference(config, base, mesh, adapter)
        report.say(
            f"Loaded {config.load}{' with ' + str(config.adapter) if adapter else ''} "
            f"in {time.perf_counter() - started:.1f} s"
        )
        sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.seed)
        started = time.perf_counter()
        with stop_requests(mesh) as stop, report.progress(config.max_new_tokens, "generating", "tokens") as progress:
            decoding = None if config.cuda_graphs else Decoding
            outputs = continue_rows(model, rows, template.stop_ids, sampling, progress.advance, decoding, stop.agreed)
        seconds = time.perf_counter() - started
        answers = [
            Answer(
                prompt=text,
                text=_text_of(output, tokenizer, template.stop_ids),
                num_tokens=len(output),
                finished=bool(output) and output[-1] in template.stop_ids,
            )
            for text, output in zip(texts, outputs, strict=True)
        ]
        if mesh.is_first:
            _print_answers(config, report, answers, seconds)
            if StopRequest.ended_a_run:
                report.warn("Stopped as requested: these are the texts so far")


def _report(config: GenerateConfig, mesh: Mesh) -> Report:
    if not mesh.is_first:
        return Report.silent()
    return Report.on_stderr() if config.json else Report()


def _text_of(output: list[int], tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> str:
    """Return the text of generated tokens. The token that ends it need not be a special one of the tokenizer."""
    ends = bool(output) and output[-1] in stop_ids
    return str(tokenizer.decode(output[:-1] if ends else output, skip_special_tokens=True)).strip()


def _prompts(
    config: GenerateConfig, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> tuple[list[str], list[list[int]]]:
    instructions = list(config.instruction)
    if config.prompts_file is not None:
        try:
            lines = config.prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                "The prompts cannot be read.", where=str(config.prompts_file), found=str(error)
            ) from error
        instructions += [line.strip() for line in lines if line.strip()]
    rows = [tokenizer.encode(text) for text in config.prompt]
    rows += [template.prompt([Message(USER, text)]) for text in instructions]
    if not rows:
        raise ConfigError("There is no prompt.", where=str(config.prompts_file), found="an empty file")
    return [*config.prompt, *instructions], rows


def _print_answers(config: GenerateConfig, report: Report, answers: Sequence[Answer], seconds: float) -> None:
    document = json.dumps([asdict(answer) for answer in answers], indent=2, ensure_ascii=False) + "\n"
    if config.output_file is not None:
        write_atomically(config.output_file, document)
    if config.json:
        print(document, end="", flush=True)
    else:
        for answer in answers:
            report.say(f"\n> {answer.prompt}\n{answer.text}")
        report.say()
    count = sum(answer.num_tokens for answer in answers)
    report.done(f"Generated {count} tokens in {seconds:.1f} s ({count / max(seconds, 1e-9):,.1f} tokens/s)")


@torch.inference_mode()
def continue_rows(
    model: MixtralModel,
    rows: Sequence[Sequence[int]],
    end_tokens: Collection[int],
    sampling: Sampling,
    on_token: Callable[[int], None] | None = None,
    decoding: type[Decoding] | None = None,
    stopped: Callable[[], bool] | None = None,
) -> list[list[int]]:
    """Return the new tokens of each row, up to and including one of `end_tokens`.

    All ranks must call with the same rows.

    Rows of different length are padded on the left; padding is masked out of attention and takes no position.

    Args:
        model: in evaluation mode.
        rows: token ids of each prompt.
        end_tokens: ids of the tokens that end a text.
        sampling: how tokens are chosen, and how many.
        on_token: called with 1 after each pass.
        decoding: class of the passes (decode.py). Default: the fastest.
        stopped: called after each pass by all ranks; True on all of them ends the generation with the tokens so far.
    """
    mesh = model.mesh
    lengths = torch.tensor([len(row) for row in rows], device=mesh.device)
    longest = int(lengths.max())
    # Padding is masked: any id of the model will do.
    tokens = torch.full((len(rows), longest), rows[0][0], dtype=torch.int64, device=mesh.device)
    for index, row in enumerate(rows):
        tokens[index, longest - len(row) :] = torch.tensor(row, device=mesh.device)
    decoding = decoding or decoding_of(model, len(rows), sampling.max_new_tokens)
    passes = decoding(model, longest - lengths, longest + sampling.max_new_tokens)
    generator = torch.Generator(device=mesh.device).manual_seed(sampling.seed)
    outputs: list[list[int]] = [[] for _ in rows]
    running = [True] * len(rows)
    for _ in range(sampling.max_new_tokens):
        chosen = choose(passes(tokens).float(), sampling, generator)
        if mesh.world_size > 1:
            # Replicas may round differently; all must continue with the same token.
            dist.broadcast(chosen, src=0)
        for index, token in enumerate(chosen.tolist()):
            if running[index]:
                outputs[index].append(token)
                running[index] = token not in end_tokens
        if on_token is not None:
            on_token(1)
        if not any(running) or (stopped is not None and stopped()):
            break
        tokens = chosen[:, None]
    passes.end()
    return outputs


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Choose the next tokens, int64 [rows], from fp32 logits [rows, vocabulary]."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits / sampling.temperature).softmax(dim=-1)
    ordered, tokens = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    # The likeliest token is never masked: no probability precedes it.
    ordered = ordered.masked_fill(before >= sampling.top_p, 0.0)
    drawn = torch.multinomial(ordered, 1, generator=generator)
    return tokens.gather(-1, drawn).squeeze(-1)

"""Settings of `generate` and `chat`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mixtral_run.config.data import chat_template_problems, chat_template_setting
from mixtral_run.config.fields import LAYOUT, MEMORY, OUTPUT, PROMPTS, setting
from mixtral_run.config.launch import LaunchConfig
from mixtral_run.config.precision import StoredBaseConfig


@dataclass(frozen=True, kw_only=True)
class InferenceConfig(LaunchConfig):
    """A base model with or without an adapter, and its chat template."""

    load: Path = setting(
        help="Base model: a converted checkpoint of any TP/EP layout, or an HF model (its directory, or its name on "
        "the hub), or the URL of either, such as s3://bucket/mixtral.",
        section=LAYOUT,
        store="input",
    )
    adapter: Path | None = setting(
        None,
        help="Adapter checkpoint that finetune saved, or a PEFT directory; or the URL of either.",
        section=LAYOUT,
        store="input",
    )
    chat_template: str = chat_template_setting(
        PROMPTS, "With --adapter, auto is the template that the adapter was trained with."
    )
    cuda_graphs: bool = setting(
        True, help="On GPUs: capture the forward pass of one token as a CUDA graph if that is faster.", section=MEMORY
    )

    def problems(self) -> list[str]:
        return super().problems() + chat_template_problems(self.chat_template)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(StoredBaseConfig, InferenceConfig):
    """Settings by which the tokens of an answer are chosen."""

    max_new_tokens: int = setting(
        128, help="Largest number of tokens to add to each prompt.", minimum=1, section=PROMPTS
    )
    temperature: float = setting(
        0.0, help="0: always take the most likely token. Above 0: sample.", minimum=0, section=PROMPTS
    )
    top_p: float = setting(
        1.0,
        help="Sample from the most likely tokens whose probabilities sum up to this.",
        above=0,
        maximum=1,
        section=PROMPTS,
    )


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """Generation of text after prompts."""

    prompt: tuple[str, ...] = setting(
        (), help="Prompt, used without a template; may be given several times.", section=PROMPTS
    )
    instruction: tuple[str, ...] = setting(
        (),
        help="Instruction, put into the chat template; may be given several times.",
        section=PROMPTS,
    )
    prompts_file: Path | None = setting(None, help="Text file with one instruction per line.", section=PROMPTS)
    prompts: Path | None = setting(
        None,
        help="JSONL file of prompts: a text, an instruction, or a conversation per line, in the shapes of training "
        "data. The last answer of a line, if it has one, is left out and generated.",
        section=PROMPTS,
    )
    batch_size: int = setting(16, help="Prompts that are answered together.", minimum=1, section=PROMPTS)
    json: bool = setting(False, help="Print the answers as JSON.", section=OUTPUT)
    output_file: Path | None = setting(None, help="JSON file to write the answers to as well.", section=OUTPUT)
    output: Path | None = setting(
        None,
        help="JSONL file that gets a line for each answer, as soon as it is complete. If the file has answers already, "
        "the prompts after them are answered.",
        section=OUTPUT,
    )

    def problems(self) -> list[str]:
        found = super().problems()
        if not (self.prompt or self.instruction or self.prompts_file or self.prompts):
            found.append("--prompt, --instruction, --prompts or --prompts-file: expected at least one; found none")
        found += ["--prompt: expected text; found an empty one" for each in self.prompt if not each]
        found += ["--instruction: expected text; found an empty one" for each in self.instruction if not each.strip()]
        others = [flag for flag, given in (("--json", self.json), ("--output-file", self.output_file)) if given]
        found += [f"--output and {flag}: expected one of them; found both" for flag in others if self.output]
        return found


@dataclass(frozen=True, kw_only=True)
class ChatConfig(SamplingConfig):
    """A conversation with a model in a terminal."""

    max_new_tokens: int = setting(512, help="Largest number of tokens of an answer.", minimum=1, section=PROMPTS)
    system: str | None = setting(None, help="System prompt of the conversation.", section=PROMPTS)

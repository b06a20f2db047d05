"""The click command of a verb, which reports all problems of a command line at once. Sections and examples in --help.

click cannot report more than one problem: its parser and its conversion of values both raise at the first one. Three
parts make up for that. `parse_args` leaves out each word that the parser refuses and parses the rest, `WholeNumber`
notes a wrong value instead of raising, and `allow_extra_args` returns the words that no parameter takes. A verb with a
config reports these problems together with those of its settings (`options.merged_config`).
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Collection, Container, Iterable, Sequence
from typing import Any

import click

from mixtral_run.cli.json_errors import expect_json
from mixtral_run.config.data import DATA_SETTINGS
from mixtral_run.config.fields import SETTINGS_ERROR, flag_of
from mixtral_run.config.names.foreign_names import answer_to, answer_to_similar, setting_meant
from mixtral_run.errors import ConfigError

PROBLEMS = "mixtral_run.problems"
"""Key of a click context's `meta`: the lines for the words that were not understood."""
MEANT = "mixtral_run.meant"
"""Key of it: the set of settings, with dashes, that flags of other programs stand for, or whose own flag has no value.
They are not missing."""
DOUBTFUL = "mixtral_run.doubtful"
"""Key of it: the set of words after unknown flags, of a verb that takes words. They may be values of these flags."""
CONFIG_SUFFIXES = (".yaml", ".yml", ".toml", ".json")
"""Ends of the names of config files."""

SECTIONS = (
    "Hosts", "Provisioning", "Model and layout", "Data", "Prompts and sampling", "Preferences", "Optimizer", "LoRA",
    "Memory and precision", "Processes", "Comparison", "Login and secrets", "Output", "Options", "On hosts",
    "Schedulers", "Slurm", "Kubernetes", "Other",
)  # fmt: skip
"""Sections of --help in their order."""

_MOST_SUGGESTED = 3


OFF, NOT_SET = "off", "not set"
"""How --help shows the defaults False and None."""
_NAMES_A_DEFAULT = re.compile(r"\[default: |\bDefault: |\[required\]")


def with_default(text: str, shown: str) -> str:
    """Return the help of an option with its default, unless the help names one or says that the option is required."""
    return text if _NAMES_A_DEFAULT.search(text) else f"{text}  [default: {shown}]"


class Option(click.Option):
    """An option with the section of --help that shows it.

    A list with commas may be given in several parts: the value of `--tags a --tags b` is `a,b`.
    Help that does not name a default gets one: off for a switch, else that the option is not set.

    bare: the value that the flag means if none of `values` follows it; None if a value must follow.
    """

    def __init__(
        self,
        *names: Any,
        section: str = "Options",
        bare: str | None = None,
        values: Container[str] = (),
        **settings: Any,
    ) -> None:
        if str(settings.get("metavar")).endswith(",…") and "multiple" not in settings:
            settings |= {"multiple": True, "callback": _with_commas}
        if settings.get("help"):
            settings["help"] = with_default(settings["help"], OFF if settings.get("is_flag") else NOT_SET)
        super().__init__(*names, **settings)
        self.section, self.bare, self.values = section, bare, values


def _with_commas(ctx: click.Context, param: click.Parameter, value: Sequence[str]) -> str | None:
    del ctx, param
    return ",".join(value) if value else None


class WholeNumber(click.ParamType[Any]):
    """A whole number, at least `minimum`. A wrong value becomes None and a line in PROBLEMS."""

    name = "integer"

    def __init__(self, minimum: int | None = None) -> None:
        self._minimum = minimum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        try:
            number = int(value)
        except ValueError:
            number = None
        if number is not None and (self._minimum is None or number >= self._minimum):
            return number
        limit = f", {self._minimum} or more" if self._minimum is not None else ""
        problem = f"expected a whole number{limit}; found {value!r}"
        if param is None or ctx is None:
            self.fail(problem, param, ctx)
        ctx.meta.setdefault(PROBLEMS, []).append(f"{param.opts[-1]}: {problem}")
        return None


def is_about_data(error: ConfigError) -> bool:
    """Return True for an error of sources of data alone. --help knows nothing about their content."""
    flags = tuple(map(flag_of, DATA_SETTINGS))
    if error.what == SETTINGS_ERROR:
        return bool(error.problems) and all(each.startswith(flags) for each in error.problems)
    return (error.where or "").startswith(flags)


class VerbCommand(click.Command):
    """A verb. examples: command lines for the end of --help, without the `mixtral-run` in front."""

    allow_extra_args = True

    def __init__(self, *args: Any, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.examples = tuple(examples)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse what can be parsed, and keep a line for each other word in `ctx.meta[PROBLEMS]`.

        Raises ConfigError with all lines if an argument is missing, or if the verb has no config to report them with.
        """
        if ctx.resilient_parsing:  # A shell completes an unfinished line.
            return super().parse_args(ctx, args)
        if "--json" in args and "--json" in self._flags():
            expect_json(ctx)
        problems: list[str] = ctx.meta.setdefault(PROBLEMS, [])
        words = self._understood(ctx, self._with_bare_values(args), problems)
        missing: list[str] = []
        try:
            extra = super().parse_args(ctx, words)
        except click.MissingParameter as error:
            extra = []
            name = error.param.metavar or str(error.param.name).upper() if error.param else "a word"
            missing = [f"{name} is missing"]
        doubtful = ctx.meta.get(DOUBTFUL, ())
        problems += [f"{word!r}: {self._refusal(word)}" for word in extra if word not in doubtful] + missing
        if any(word.lower().endswith(CONFIG_SUFFIXES) for word in extra):
            # A config file without --config in front of it may hold any setting.
            ctx.meta.setdefault(MEANT, set()).update(name[2:] for name in self._flags())
        if missing or (problems and not any(each.name == "config" for each in self.params)):
            raise ConfigError(
                "The command line cannot be understood.",
                where="command line",
                problems=problems,
                next_command=f"{ctx.command_path} --help",
            )
        return []

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb. An error of its settings or inputs without a next command gets that of the verb's help."""
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            if not any("next:" in each for each in error.problems) and not is_about_data(error):
                error.next_command = error.next_command or f"{ctx.command_path} --help"
            raise

    def _with_bare_values(self, args: Sequence[str]) -> list[str]:
        """Return the words with `--flag=value` for each flag that stands alone and means that value."""
        bare = {name: each for each in self.params if isinstance(each, Option) and each.bare for name in each.opts}
        found = []
        for word, following in itertools.zip_longest(args, args[1:], fillvalue=""):
            option = bare.get(word)
            found.append(f"{word}={option.bare}" if option and following not in option.values else word)
        return found

    def _understood(self, ctx: click.Context, args: Sequence[str], problems: list[str]) -> list[str]:
        """Return the words that click's parser accepts, and append a line to `problems` for each other word.

        The parser consumes the list that it gets, so the length of the rest tells at which word it stopped. The word
        after an unknown flag counts as its value if the verb takes no arguments.
        """
        words = list(args)
        while True:
            rest = list(words)
            try:
                self.make_parser(ctx).parse_args(rest)
            except (click.NoSuchOption, click.BadOptionUsage) as error:
                stopped = len(words) - len(rest) - 1
                word, has_value = words[stopped], "=" in words[stopped]
                if isinstance(error, click.NoSuchOption):
                    problems.append(f"{error.option_name}: there is no such flag{self._meant(error.option_name)}")
                    meant = self._note_meant(ctx, error.option_name)
                    if not has_value and rest and not rest[0].startswith("-"):
                        # The one word of `up HOST` is not the value of a flag whose meaning is known.
                        if self._takes_words() and not (meant and self._takes_one_word()):
                            ctx.meta.setdefault(DOUBTFUL, set()).add(rest[0])
                        else:
                            del rest[0]
                elif has_value:
                    problems.append(f"{error.option_name}: expected no value; found {word.partition('=')[2]!r}")
                else:
                    problems.append(f"{error.option_name}: expected a value after it; found none")
                    ctx.meta.setdefault(MEANT, set()).add(str(error.option_name).lstrip("-"))
                words = words[:stopped] + rest
            else:
                return words

    def _takes_words(self) -> bool:
        return any(isinstance(each, click.Argument) for each in self.params)

    def _takes_one_word(self) -> bool:
        return [each.nargs for each in self.params if isinstance(each, click.Argument)] == [1]

    def _refusal(self, word: str) -> str:
        """Return why a word that no parameter takes is wrong."""
        if self._takes_words():
            return "expected nothing there"
        if word.lower().endswith(CONFIG_SUFFIXES) and any(each.name == "config" for each in self.params):
            return f"a flag before it is missing; write --config {word}"
        return "a flag before it is missing"

    def _flags(self) -> list[str]:
        options = [each for each in self.params if isinstance(each, click.Option) and not each.hidden]
        return [name for each in options for name in (*each.opts, *each.secondary_opts) if name.startswith("--")]

    def _note_meant(self, ctx: click.Context, flag: str) -> bool:
        """Keep the setting that a flag of another program stands for, so that it is not reported as missing.

        Return True if there is one.
        """
        setting = setting_meant(flag.lstrip("-"), [name[2:] for name in self._flags()])
        if setting is not None:
            ctx.meta.setdefault(MEANT, set()).add(setting)
        return setting is not None

    def _meant(self, flag: str) -> str:
        """Return the kit's own flag for one of another program, else "; did you mean …?" for one that is close to it.

        Return nothing if no flag of the verb is close.
        """
        names = self._flags()
        foreign = answer_to(flag.lstrip("-"), [name[2:] for name in names], lambda name: f"--{name}")
        if foreign is not None:
            return f"; {foreign}"
        if len(flag) < 4:
            return ""
        if flag == "--json":
            # The flags with a name like this one do something else.
            return "; this verb prints no JSON"
        found = [name for name in names if name.startswith(flag)]
        # Megatron's users write --tp for --tensor-model-parallel-size.
        found = found or [name for name in names if len(flag) < 6 and _are_initials(flag[2:], name[2:])]
        found = found or ["--" + name for name in close_to(flag[2:], [name[2:] for name in names])]
        if found:
            return f"; did you mean {or_words(found[:_MOST_SUGGESTED])}?"
        similar = answer_to_similar(flag.lstrip("-"), [name[2:] for name in names], lambda name: f"--{name}")
        return f"; {similar}" if similar else ""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in SECTIONS}
        for each in self.get_params(ctx):
            record = each.get_help_record(ctx)
            if record is not None and not isinstance(each, click.Argument):
                sections[getattr(each, "section", "Other")].append(record)
        for name, records in sections.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        if not self.examples:
            return
        with formatter.section("Examples"):
            for example in self.examples:
                # Not write_text: a wrapped command line cannot be copied.
                formatter.write(f"{'':{formatter.current_indent}}mixtral-run {example}\n")


class VerbGroup(click.Group):
    """A verb with verbs of its own."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if not ctx.resilient_parsing and args[0] not in self.commands:
            meant = or_words(close_to(args[0], self.commands))
            raise ConfigError(
                f"There is no verb {args[0]!r} of {ctx.command_path}.",
                expected=one_of(self.commands),
                next_command=f"{ctx.command_path} {meant}" if meant else f"{ctx.command_path} --help",
            )
        return super().resolve_command(ctx, args)


def close_to(word: str, names: Iterable[str]) -> list[str]:
    """Return the names that `word` may mean, the closest first.

    click's own suggestions compare flags with their dashes, so that two flags of one common letter count as close.
    """
    return difflib.get_close_matches(word, list(names), _MOST_SUGGESTED)


def one_of(names: Collection[str]) -> str:
    """Return `one of a, b`, or the only name."""
    return ("one of " if len(names) > 1 else "") + ", ".join(names)


def or_words(names: Sequence[str]) -> str:
    """Return `a`, `a or b`, or `a, b or c`."""
    return _joined(names, " or ")


def and_words(names: Sequence[str]) -> str:
    """Return `a`, `a and b`, or `a, b and c`."""
    return _joined(names, " and ")


def _joined(names: Sequence[str], last: str) -> str:
    return last.join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _are_initials(letters: str, name: str) -> bool:
    """Return True if `letters` are initials of the words of `name`, in order and from the first word on."""
    initials = iter(part[0] for part in name.split("-") if part)
    return len(letters) > 1 and letters[0] == name[0] and all(letter in initials for letter in letters)

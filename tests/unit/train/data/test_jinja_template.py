"""Jinja chat templates: equal to Transformers' apply_chat_template; what is learned; what is refused."""

import random
from typing import Any

import pytest

from mixtral_run.train.data.example import Example, Message
from mixtral_run.train.data.open_template import open_chat_template
from tests.support.mistral_tokenizers import hf_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = (
    *(
        "the",
        "model",
        "answers",
        "56",
        "def f(x):",
        "x_1",
        "Grüße",
        "東京",
        "です",
        "привет",
        "👩\u200d👩\u200d👧",
        "e\u0301",
        "ﬁ",
    ),
    *("▁", "]]", "{", "\\", '"', "[INST]", "<|", "|>", "\u00a0", "\u3000"),
)


@pytest.fixture(scope="module")
def chatml() -> Any:
    """Return Mixtral's tokenizer with the two tokens of ChatML, as fine-tunes have it."""
    import copy

    tokenizer = copy.deepcopy(hf_tokenizer("v1"))
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.add_tokens(["<|im_start|>"])
    tokenizer.chat_template = CHATML
    return tokenizer


def with_template(tokenizer: Any, template: Any) -> Any:
    import copy

    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


def conversation(rng: random.Random) -> list[Message]:
    def text() -> str:
        around = ("", "", " ", "\n", "\n   ")
        return rng.choice(around) + " ".join(rng.choices(WORDS, k=rng.randint(1, 12))) + rng.choice(around)

    messages = [Message("system", text())] * (rng.random() < 0.4)
    for _ in range(rng.randint(1, 4)):
        messages += [Message("user", text()), Message("assistant", text())]
    return messages


def as_dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "generation blocks"])
def test_tokens_and_learned_positions_are_those_of_apply_chat_template(chatml: Any, template: str) -> None:
    rng, found = random.Random(21), open_chat_template("auto", with_template(chatml, template))
    assert found.name == "tokenizer"
    for _ in range(500):
        messages = conversation(rng)
        expected = chatml.apply_chat_template(
            as_dicts(messages), chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        encoded = found.encode(Example("line 1", tuple(messages)))
        assert encoded.tokens.tolist() == expected["input_ids"], messages
        learned = [place for begin, end in encoded.learned for place in range(begin, end)]
        assert learned == [place for place, counts in enumerate(expected["assistant_masks"]) if counts], messages
        prompt = chatml.apply_chat_template(as_dicts(messages[:-1]), add_generation_prompt=True, return_dict=False)
        assert found.prompt(messages[:-1]) == prompt

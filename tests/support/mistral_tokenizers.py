"""Mixtral's tokenizers as mistral-common has them, in the form in which Transformers has them, and its own encoding."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

FILES = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}


@cache
def hf_tokenizer(version: str) -> Any:
    """Return the tokenizer of a version as the released tokenizer.json has it: with `▁` before every text.

    Transformers itself reads a tokenizer.model without its scores, and without the `▁`.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = SentencePieceProcessor(model_file=str(_file(version)))
    texts = [pieces.id_to_piece(number) for number in range(len(pieces))]
    vocabulary = {text: number for number, text in enumerate(texts)}
    merges = []
    for number, text in enumerate(texts):
        if pieces.is_control(number) or pieces.is_unknown(number) or pieces.is_byte(number):
            continue
        parts = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        known = (pair for pair in parts if pair[0] in vocabulary and pair[1] in vocabulary)
        merges += [(pieces.get_score(number), len(pair[0]), len(pair[1]), pair) for pair in known]
    merges.sort(reverse=True)
    core = Tokenizer(
        models.BPE(vocabulary, [pair for *_, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [text for number, text in enumerate(texts) if pieces.is_control(number)]
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", *control)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _file(version: str) -> Path:
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / FILES[version]


class MistralCommon:
    """The tokenizer of a version with mistral-common's steps for fine-tuning: validation, normalization, encoding."""

    def __init__(self, version: str) -> None:
        from mistral_common.protocol.instruct import messages, normalize, request, tool_calls, validator
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        mode = validator.ValidationMode.finetuning
        self._mistral = MistralTokenizer.from_file(str(_file(version)), mode=mode)
        validators = {"v1": validator.MistralRequestValidator, "v3": validator.MistralRequestValidatorV3}
        self._validator: Any = validators[version](mode)
        self._classes: dict[str, Any] = {
            "system": messages.SystemMessage,
            "user": messages.UserMessage,
            "assistant": messages.FinetuningAssistantMessage,
            "tool": messages.ToolMessage,
        }
        classes = (self._classes[role] for role in ("user", "assistant", "tool", "system"))
        self._normalizer: Any = normalize.InstructRequestNormalizer(*classes, request.InstructRequest)
        self._request: Any = request.ChatCompletionRequest
        self._tool: Any = tool_calls.Tool

    def encode(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Return the ids of a conversation, and the positions of those that are learned.

        messages: in the form of chat APIs; an answer may have `weight`.
        """
        built = [
            self._classes[each["role"]](**{key: value for key, value in each.items() if key != "role"})
            for each in messages
        ]
        request = self._request.model_construct(messages=built, tools=[self._tool(**tool) for tool in tools] or None)
        request = self._normalizer.from_chat_completion_request(self._validator.validate_request(request))
        encoder: Any = self._mistral.instruct_tokenizer
        first, last = encoder.find_first_last_user(request)
        ids: list[int] = encoder.start()
        learned: list[int] = []
        for place, message in enumerate(request.messages):
            if message.role == "user":
                where = place == last, place == first
                found = encoder.encode_user_message(message, request.available_tools, *where, request.system_prompt)[0]
            elif message.role == "tool":
                found = encoder.encode_tool_message(message, place < last)
                found = found[0] if isinstance(found, tuple) else found
            else:
                found = encoder.encode_assistant_message(message, place < last, False)
                learned += range(len(ids), len(ids) + len(found)) if message.weight != 0 else ()
            ids = [*ids, *found]
        return ids, learned

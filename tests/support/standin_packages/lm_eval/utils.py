"""STAND-IN for lm-eval's windows over long texts."""

from collections.abc import Iterator


def get_rolling_token_windows(
    token_list: list[int], prefix_token: int, max_seq_len: int, context_len: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield inputs and predicted tokens of windows that follow each other, each with `context_len` tokens before it."""
    whole = [prefix_token, *token_list]
    step = max_seq_len - context_len + 1
    begin = 0
    while begin < len(token_list):
        end = min(begin + (max_seq_len if begin == 0 else step), len(token_list))
        yield whole[max(0, end - max_seq_len) : end], token_list[begin:end]
        begin = end


def make_disjoint_window(pair: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
    """Return the input without what is predicted, and what is predicted."""
    inputs, predicted = pair
    return inputs[: len(inputs) - len(predicted) + 1], predicted

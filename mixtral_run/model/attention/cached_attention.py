"""Attention of one new token of each row to a cache of fixed size, into which its key and value are written."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mixtral_run.model.attention.rotary import split_and_rotate
from mixtral_run.model.kernels.selected import kernels_of


def cached_attention(
    mixed: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor, place: Tensor, mask: Tensor
) -> Tensor:
    """Write the tokens' keys and values into the cache and return their attention, [1, batch, heads · head size].

    There is no gradient. On a GPU this is two kernels for bf16.

    Args:
        mixed: [1, batch, groups, heads of a group + 2, head size], see rotary.split_and_rotate.
        cosine, sine: [batch or 1, 1, head size].
        keys, values: the cache, [batch, groups, max_length, head size].
        place: int64 [1] on the device, the index of the new token in the cache.
        mask: bool [batch, 1, 1, max_length], True where attention is allowed. That includes `place`, and nothing after
            it.
    """
    if _has_kernel(mixed, keys):
        from mixtral_run.model.kernels.decoding.cached_attention_triton import cached_attention as on_gpu

        return on_gpu(mixed, cosine, sine, keys, values, place, mask)
    return plain_cached_attention(mixed, cosine, sine, keys, values, place, mask)


def plain_cached_attention(
    mixed: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor, place: Tensor, mask: Tensor
) -> Tensor:
    """Compute `cached_attention` by torch's attention."""
    _, batch, groups, _, size = mixed.shape
    query, key, value = split_and_rotate(mixed, cosine, sine)
    keys.index_copy_(2, place, key.permute(1, 2, 0, 3))
    values.index_copy_(2, place, value.permute(1, 2, 0, 3))
    # The heads of a group become queries of one head, so that keys need not be repeated.
    query = query.view(batch, groups, -1, size)
    context = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=1.0 / math.sqrt(size))
    return context.reshape(1, batch, -1)


def _has_kernel(mixed: Tensor, keys: Tensor) -> bool:
    if kernels_of(mixed.device) is None or keys.element_size() != 2 or mixed.dtype is not keys.dtype:
        return False
    from mixtral_run.model.kernels.decoding.cached_attention_triton import SIZES

    return mixed.shape[-1] in SIZES and keys.is_contiguous()

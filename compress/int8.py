"""8 bits: codes from -127 to 127; a scale and an offset for each dim of keys, scales of values."""

import torch
from torch import Tensor

from compress.channels import channels, keys_from
from compress.record import (
    Records,
    check_head_dim,
    joined_rows,
    key_lanes,
    keys_of,
    value_lanes,
    values_of,
)
from compress.shape import KVShape

LARGEST_CODE = 127


class Int8:
    """8-bit codes: a key is offset + scale * code, a value is scale * code.

    Keys have a scale and an offset for each dim of a block (`compress.channels`). Values have a
    scale for each token, the row's largest magnitude over 127. Scales are rounded to bfloat16
    *before* codes are computed, so an error is at most half the scale that is stored, also for the
    largest number, which is at most 127 * (1 + 2^-8) steps, less than 127.5. (Rows or channels that
    vary by less than 2^-119 have scales of fewer digits; their error stays below 2^-126.) Where a
    token's key or value has NaN or infinity, its value scale is NaN, and so are both.

    Record, version 3: keys int8 [head_dim / 4, block_tokens, 4], values int8 [block_tokens / 4,
    head_dim, 4]; then, bfloat16, scales of values [block_tokens], scales of keys [head_dim],
    offsets of keys [head_dim].
    """

    name = "int8"
    version = 3
    lossless = False
    in_place = False

    def __init__(self, shape: KVShape) -> None:
        check_head_dim(self.name, shape)
        self.shape = shape
        tokens, dim = shape.block_tokens, shape.head_dim
        self._records = Records(
            shape.kv_heads,
            [
                (torch.int32, (dim // 4, tokens)),
                (torch.int8, (tokens // 4, dim, 4)),
                (torch.bfloat16, (tokens,)),
                (torch.bfloat16, (dim,)),
                (torch.bfloat16, (dim,)),
            ],
        )
        self.page_bytes = self._records.page_bytes

    def encode(self, rows: Tensor) -> Tensor:
        by_channel = channels(rows[:, :, 0], LARGEST_CODE)
        wide = rows[:, :, 1].float()
        scales = (wide.abs().amax(-1) * (1 / LARGEST_CODE)).to(torch.bfloat16)
        finite = scales.isfinite() & by_channel.whole  # [blocks, tokens, kv_heads]
        # A row of zeros has scale 0; any divisor gives it codes of 0
        steps = torch.where(finite & (scales > 0), scales, 1.0).float()
        codes = torch.where(finite[..., None], wide / steps[..., None], 0.0)

        pages = self._records.empty(len(rows), rows.device)
        keys, values, value_scales, key_scales, key_offsets = self._records.views(pages)
        keys.copy_(key_lanes(_rounded(by_channel.steps)))
        values.copy_(value_lanes(_rounded(codes)))
        value_scales.copy_(torch.where(finite, scales, torch.nan).transpose(1, 2))
        key_scales.copy_(by_channel.scales)
        key_offsets.copy_(by_channel.offsets)
        return pages

    def decode(self, pages: Tensor) -> Tensor:
        keys, values, value_scales, key_scales, key_offsets = self._records.views(pages)
        scales = value_scales.float().transpose(1, 2)  # [blocks, tokens, kv_heads]
        whole = ~scales.isnan()
        return joined_rows(
            keys_from(keys_of(keys, torch.int8), key_scales, key_offsets, whole),
            values_of(values) * scales[..., None],
            self.shape.dtype,
        )


def _rounded(steps: Tensor) -> Tensor:
    return steps.round().clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int8)

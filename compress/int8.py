"""8 bits: codes from -127 to 127, and a scale for each token, head, and key or value."""

import torch
from torch import Tensor

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
    """Symmetric 8-bit codes: a value is scale * code, to within half the scale that is stored.

    The scale is the row's largest magnitude over 127, rounded to bfloat16 *before* the codes are
    computed. The bound holds for the largest value too, which is at most 127 * (1 + 2^-8) steps,
    less than 127.5. (Rows below 2^-119 have scales of fewer digits; their error stays below
    2^-126.) A row with NaN or infinity has a scale of NaN.

    Record, version 2: keys int8 [head_dim / 4, block_tokens, 4], values int8 [block_tokens / 4,
    head_dim, 4], scales of keys bfloat16 [block_tokens], scales of values bfloat16 [block_tokens].
    """

    name = "int8"
    version = 2
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
                (torch.bfloat16, (tokens,)),
            ],
        )
        self.page_bytes = self._records.page_bytes

    def encode(self, rows: Tensor) -> Tensor:
        wide = rows.float()
        scales = (wide.abs().amax(-1) * (1 / LARGEST_CODE)).to(torch.bfloat16)
        finite = scales.isfinite()  # [blocks, tokens, 2, kv_heads]
        # A row of zeros has scale 0; any divisor gives it codes of 0
        steps = torch.where(finite & (scales > 0), scales, 1.0).float()
        codes = (wide / steps[..., None]).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
        codes = torch.where(finite[..., None], codes, 0.0).to(torch.int8)
        scales = torch.where(finite, scales, torch.nan)

        pages = self._records.empty(len(rows), rows.device)
        keys, values, key_scales, value_scales = self._records.views(pages)
        keys.copy_(key_lanes(codes[:, :, 0]))
        values.copy_(value_lanes(codes[:, :, 1]))
        key_scales.copy_(scales[:, :, 0].transpose(1, 2))
        value_scales.copy_(scales[:, :, 1].transpose(1, 2))
        return pages

    def decode(self, pages: Tensor) -> Tensor:
        keys, values, key_scales, value_scales = self._records.views(pages)
        return joined_rows(
            keys_of(keys, torch.int8) * _by_row(key_scales),
            values_of(values) * _by_row(value_scales),
            self.shape.dtype,
        )


def _by_row(scales: Tensor) -> Tensor:
    """[blocks, kv_heads, tokens] -> [blocks, tokens, kv_heads, 1], float32."""
    return scales.float().transpose(1, 2)[..., None]

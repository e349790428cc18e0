"""4 bits: codes from 0 to 15; a scale and an offset for each dim of keys and row of values."""

import torch
from torch import Tensor

from compress.channels import channels, keys_from
from compress.record import (
    DIM_MULTIPLE,
    Records,
    check_head_dim,
    joined_rows,
    key_lanes,
    keys_of,
    value_lanes,
    values_of,
)
from compress.shape import KVShape

LARGEST_CODE = 15
LARGEST_STEP = LARGEST_CODE / 2  # of keys, whose codes count from the middle
LARGEST_GROUP = 64
TOKEN_AXIS, DIM_AXIS = 1, 3  # of [blocks, tokens, kv_heads, dims]


def group_dims(head_dim: int) -> int:
    """Return the dims that share a scale: the largest divisor up to 64 that is a multiple of 8."""
    groups = range(LARGEST_GROUP, 0, -DIM_MULTIPLE)
    return next(dims for dims in groups if head_dim % dims == 0)


class Int4:
    """4-bit codes: a key is offset + scale * (code - 7.5), a value is minimum + scale * code.

    Keys have a scale and an offset for each dim of a block (`compress.channels`), values a scale
    and a minimum for each token and group of dims. All are rounded to bfloat16 before codes are
    computed: the minimum down, the scales, from it to the largest value over 15, to the nearest. So
    none is below 0 and the largest is at most 15 * (1 + 2^-8) steps, less than 15.5, and an error
    is at most half the stored scale. (Scales below 2^-126 have fewer digits; the error then stays
    below 2^-126.) Where a token's key has NaN or infinity, or a group of its value has, or more
    than float32 can span, the scales and minimums of its value are NaN, and so are key and value.

    Record, version 2: keys uint8 [head_dim / 8, block_tokens, 4], where byte i of four j has dim
    8j + i in its low half and dim 8j + 4 + i in its high one; values uint8 [block_tokens / 8,
    head_dim, 4], likewise with tokens; then, bfloat16, scales of values [head_dim / group_dims,
    block_tokens], minimums of values likewise, scales of keys [head_dim], offsets of keys
    [head_dim].
    """

    name = "int4"
    version = 2
    lossless = False
    in_place = False

    def __init__(self, shape: KVShape) -> None:
        check_head_dim(self.name, shape)
        self.shape = shape
        tokens, dim = shape.block_tokens, shape.head_dim
        self._group = group_dims(dim)
        per_group = (torch.bfloat16, (dim // self._group, tokens))
        self._records = Records(
            shape.kv_heads,
            [
                (torch.int32, (dim // 8, tokens)),
                (torch.uint8, (tokens // 8, dim, 4)),
                *[per_group] * 2,
                *[(torch.bfloat16, (dim,))] * 2,
            ],
        )
        self.page_bytes = self._records.page_bytes

    def encode(self, rows: Tensor) -> Tensor:
        by_channel = channels(rows[:, :, 0], LARGEST_STEP)
        key_codes = (by_channel.steps + LARGEST_STEP).round_().clamp_(0, LARGEST_CODE)
        value_codes, scales, minimums = self._rounded(rows[:, :, 1].float(), by_channel.whole)

        pages = self._records.empty(len(rows), rows.device)
        keys, values, value_scales, value_minimums, key_scales, key_offsets = self._records.views(
            pages
        )
        keys.copy_(key_lanes(_halves_joined(key_codes.to(torch.uint8), DIM_AXIS)))
        values.copy_(value_lanes(_halves_joined(value_codes, TOKEN_AXIS)))
        value_scales.copy_(scales.permute(0, 2, 3, 1))
        value_minimums.copy_(minimums.permute(0, 2, 3, 1))
        key_scales.copy_(by_channel.scales)
        key_offsets.copy_(by_channel.offsets)
        return pages

    def decode(self, pages: Tensor) -> Tensor:
        keys, values, value_scales, value_minimums, key_scales, key_offsets = self._records.views(
            pages
        )
        key_steps = _halves_apart(keys_of(keys, torch.uint8), DIM_AXIS) - LARGEST_STEP
        value_codes = _halves_apart(values_of(values), TOKEN_AXIS)
        whole = ~value_scales[:, :, 0].isnan().transpose(1, 2)  # [blocks, tokens, kv_heads]
        return joined_rows(
            keys_from(key_steps, key_scales, key_offsets, whole),
            self._restored(value_codes, value_scales, value_minimums),
            self.shape.dtype,
        )

    def _rounded(self, wide: Tensor, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Round `wide` [..., head_dim] to codes, scales and minimums, of the rows that are `whole`.

        Codes are uint8 of its shape; scales and minimums are bfloat16 [..., groups].
        A group from -1 to 2 has minimum -1 and scale 0.2, about. In it 0.45 is 7.25 steps above the
        minimum, so its code is 7, and it comes back as 0.4.
        """
        groups = torch.unflatten(wide, -1, (-1, self._group))
        minimums = _rounded_down(groups.amin(-1))
        spans = groups.amax(-1) - minimums + 0.0  # which turns -0.0 into 0.0
        scales = (spans * (1 / LARGEST_CODE)).to(torch.bfloat16)
        finite = (spans.isfinite() & scales.isfinite()).all(-1, keepdim=True) & whole[..., None]
        # Equal values that bfloat16 holds have scale 0; any divisor gives them codes of 0
        steps = torch.where(finite & (scales > 0), scales, 1.0).float()
        codes = ((groups - minimums[..., None]) / steps[..., None]).round_()
        codes = torch.where(finite[..., None], codes.clamp_(0, LARGEST_CODE), 0.0)
        return (
            codes.flatten(-2).to(torch.uint8),
            torch.where(finite, scales, torch.nan),
            torch.where(finite, minimums.to(torch.bfloat16), torch.nan),
        )

    def _restored(self, codes: Tensor, scales: Tensor, minimums: Tensor) -> Tensor:
        """Return the values, float32, of codes [blocks, tokens, heads, head_dim].

        `scales` and `minimums` are as they are stored: [blocks, heads, groups, tokens].
        """
        groups = torch.unflatten(codes, -1, (-1, self._group)).float()
        scale, minimum = _by_row(scales), _by_row(minimums)
        return (groups * scale + minimum).flatten(-2)


def _by_row(numbers: Tensor) -> Tensor:
    """[blocks, heads, groups, tokens] -> float32 [blocks, tokens, heads, groups, 1]."""
    return numbers.float().permute(0, 3, 1, 2)[..., None]


def _rounded_down(wide: Tensor) -> Tensor:
    """Return, as float32, the largest bfloat16 that is not above each float32; never -0.0.

    bfloat16 is the upper half of float32. Cutting off the lower half moves towards zero, which is
    down for a positive number; a negative one is first moved away from zero, past any lower half.
    """
    bits = (wide + 0.0).view(torch.int32)
    away = torch.where(wide < 0, bits + 0xFFFF, bits)
    return (away & ~0xFFFF).view(torch.float32)


def _halves_joined(codes: Tensor, axis: int) -> Tensor:
    """Put two codes into a byte: of each eight along `axis`, code j is low and 4 + j high."""
    low, high = torch.unflatten(codes, axis, (-1, 2, 4)).unbind(axis + 1)
    return (low | high << 4).flatten(axis, axis + 1)


def _halves_apart(pairs: Tensor, axis: int) -> Tensor:
    """Undo `_halves_joined`."""
    quads = torch.unflatten(pairs, axis, (-1, 4))
    return torch.stack((quads & 15, quads >> 4), dim=axis + 1).flatten(axis, axis + 2)

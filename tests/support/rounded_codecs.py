"""Codecs that only round: what a codec's damage is, without its format."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from compress.channels import channels, keys_from
from compress.shape import KVShape
from compress.unscaled import Raw

LARGEST_FLOAT8 = 448.0  # of e4m3: 4 bits of exponent, 3 of mantissa


class Rounded(Raw):
    """Pages of what is left of rows after `rounding`: a codec by its damage alone."""

    lossless = False

    def __init__(self, shape: KVShape, rounding: Callable[[Tensor], Tensor]) -> None:
        super().__init__(shape)
        self.lossless = False
        self._rounding = rounding

    def encode(self, rows: Tensor) -> Tensor:
        return super().encode(self._rounding(rows.float()).to(rows.dtype))


def four_levels(rows: Tensor) -> Tensor:
    low, high = rows.aminmax(dim=-1, keepdim=True)
    step = (high - low).clamp_min(1e-8) / 3
    return ((rows - low) / step).round() * step + low


def q4_0(rows: Tensor) -> Tensor:
    """llama.cpp's 4-bit format: 32 values share a scale, which the largest sets to -8."""
    parts = rows.unflatten(-1, (-1, 32))
    peak = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))
    scale = (peak / -8).half().float()
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return ((parts * inverse + 8.5).floor().clamp(0, 15).sub(8) * scale).flatten(-2)


def float8(rows: Tensor) -> Tensor:
    """8-bit floating point (e4m3) without scales, as most engines store KV unless calibrated."""
    return rows.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn).float()


def float8_by_row(rows: Tensor) -> Tensor:
    """A scale, in bfloat16, for each token and head: what is largest there becomes 448."""
    scales = (rows.abs().amax(-1, keepdim=True) / LARGEST_FLOAT8).bfloat16().float()
    return float8(rows / scales.clamp_min(1e-30)) * scales


def float8_by_group(rows: Tensor) -> Tensor:
    """A scale for every 32 values of a token and head."""
    return float8_by_row(rows.unflatten(-1, (-1, 32))).flatten(-2)


def float8_by_channel(rows: Tensor) -> Tensor:
    """The scales and offsets of `int8`, and so its bytes: keys by channel, values by token."""
    by_channel = channels(rows[:, :, 0], LARGEST_FLOAT8)
    keys = keys_from(
        float8(by_channel.steps), by_channel.scales, by_channel.offsets, by_channel.whole
    )
    return torch.stack((keys, float8_by_row(rows[:, :, 1])), dim=2)


FLOAT8 = {
    name: partial(Rounded, rounding=rounding)
    for name, rounding in (
        ("float8", float8),
        ("float8_by_row", float8_by_row),
        ("float8_by_group", float8_by_group),
        ("float8_by_channel", float8_by_channel),
    )
}

# `same` changes nothing, `bad` leaves two bits, `q4_0` rounds as llama.cpp does.
ROUNDED = {
    name: partial(Rounded, rounding=rounding)
    for name, rounding in (("same", torch.clone), ("bad", four_levels), ("q4_0", q4_0))
}

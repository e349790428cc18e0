"""Codecs that only round: what a codec's damage is, without its format."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from compress.shape import KVShape
from compress.unscaled import Raw


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


# `same` changes nothing, `bad` leaves two bits, `q4_0` rounds as llama.cpp does.
ROUNDED = {
    name: partial(Rounded, rounding=rounding)
    for name, rounding in (("same", torch.clone), ("bad", four_levels), ("q4_0", q4_0))
}

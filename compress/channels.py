"""Rounds keys channel by channel: each dim of a block has its own offset and scale.

Keys have a few large dims, the same ones in each token: a learned bias of several hundred beside
values of one or two, turned by the rotary embedding. One scale for all dims of a token gives them
all digits. By channel, a dim's error is in proportion to how much *it* varies within the block, so
a bias takes nothing from the others: its offset is taken out, and if it turns within the block, its
scale alone grows.
Source: KIVI, https://arxiv.org/abs/2402.02750
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BF16_LARGEST = torch.finfo(torch.bfloat16).max
TOKEN_AXIS = 1  # of [blocks, tokens, kv_heads, dims]


@dataclass(frozen=True, slots=True)
class Channels:
    """Keys by channel: a key is offset + scale * step, where steps are at most `largest_step`.

    `steps` float32 [blocks, tokens, kv_heads, dims] are not rounded yet, but the numbers are that
    say what they mean: `scales` and `offsets` bfloat16 [blocks, kv_heads, dims]. A token with NaN
    or infinity is not `whole` [blocks, tokens, kv_heads]; its steps are 0, and it moves nothing.
    """

    steps: Tensor
    scales: Tensor
    offsets: Tensor
    whole: Tensor


def channels(keys: Tensor, largest_step: float) -> Channels:
    """Measure each channel of `keys` [blocks, tokens, kv_heads, dims], of any floating type.

    The offset is the middle between the least and the largest key, rounded to bfloat16; the scale,
    from it to the farther of the two over `largest_step`, is rounded to the nearest *afterwards*.
    So a step is at most `largest_step` * (1 + 2^-8). Keys from 298 to 302 have offset 300 and, for
    steps up to 127, scale 2/127: nothing is lost of them for being large.
    """
    wide = keys.float()
    whole = wide.isfinite().all(-1)
    seen, some = whole[..., None], whole.any(TOKEN_AXIS)[..., None]
    high = torch.where(seen, wide, -torch.inf).amax(TOKEN_AXIS)
    low = torch.where(seen, wide, torch.inf).amin(TOKEN_AXIS)
    high, low = torch.where(some, high, 0.0), torch.where(some, low, 0.0)
    # + 0.0 turns -0.0 into 0.0, here and below
    middle = (high * 0.5 + low * 0.5 + 0.0).clamp(-BF16_LARGEST, BF16_LARGEST)
    offsets = middle.to(torch.bfloat16)
    offset = offsets.float()
    reach = torch.maximum(high - offset, offset - low) + 0.0
    scales = (reach * (1 / largest_step)).to(torch.bfloat16)
    # A channel of equal keys that bfloat16 holds has scale 0; any divisor gives it steps of 0
    divisors = torch.where(scales > 0, scales, 1.0).float()
    steps = (wide - offset[:, None]) / divisors[:, None]
    return Channels(torch.where(seen, steps, 0.0), scales, offsets, whole)


def keys_from(steps: Tensor, scales: Tensor, offsets: Tensor, whole: Tensor) -> Tensor:
    """Return keys float32 [blocks, tokens, kv_heads, dims] of rounded steps; NaN if not `whole`."""
    keys = steps * scales.float()[:, None] + offsets.float()[:, None]
    return torch.where(whole[..., None], keys, torch.nan)

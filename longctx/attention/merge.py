"""Exact attention on the union of disjoint key sets, from the results on each.

Source: Ring Attention, https://arxiv.org/abs/2310.01889
"""

import torch
from torch import Tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint key sets into that over their union.

    Either set may be empty (lse -inf).

    `out_*` [..., head_dim] and `lse_*` [...], float32, natural log. An empty side's out is ignored,
    whatever it holds.
    """
    peak = torch.maximum(lse_a, lse_b)
    finite_peak = torch.where(peak == -torch.inf, 0.0, peak)
    weight_a, weight_b = torch.exp(lse_a - finite_peak), torch.exp(lse_b - finite_peak)
    total = weight_a + weight_b
    divisor = total.clamp_min(torch.finfo(torch.float32).tiny)
    share_a, share_b = (weight_a / divisor).unsqueeze(-1), (weight_b / divisor).unsqueeze(-1)
    out = torch.where(share_a > 0, out_a, 0.0) * share_a
    out = out + torch.where(share_b > 0, out_b, 0.0) * share_b
    return out, finite_peak + torch.log(total)


def merge_parts(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over many disjoint key sets, any of which may be empty (lse -inf).

    `outs` [rows, parts, heads, head_dim] and `lses` [rows, parts, heads], float32.
    """
    lse = torch.logsumexp(lses, dim=1)
    weights = torch.exp(lses - torch.where(lse == -torch.inf, 0.0, lse)[:, None])[..., None]
    return torch.where(weights > 0, outs * weights, 0.0).sum(1), lse


def merge_sink(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Merge with a key of value zero, whose logit is learned per head.

    `out` [tokens, heads, head_dim], `lse` [tokens, heads], `sinks` [heads].
    """
    return merge(out, lse, torch.zeros_like(out), sinks.float().expand_as(lse))

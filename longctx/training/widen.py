"""Starts a wide model from a trained narrow one: at first it computes the same.

The narrow weights are the first rows and columns. The new part of the residual stream
is read with random weights but nothing writes to it yet, and new units of an MLP are computed but
not read, so that every new weight has a gradient. Source: Net2Net, https://arxiv.org/abs/1511.05641
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WRITERS = ("embed_tokens.weight", "lm_head.weight", "o_proj.weight", "down_proj.weight")


@torch.no_grad()
def widen(model: nn.Module, narrow: dict[str, Tensor]) -> None:
    """Load `narrow` (heads and layers as in `model`, each width at most the model's) into `model`.

    A norm divides by the root mean square over the whole width, new zeros included; its weight
    makes up for that.
    """
    for name, weight in model.named_parameters():
        old = narrow[name]
        if weight.dim() == 1:
            weight.fill_(float(old.mean()))
            weight[: len(old)] = old
            weight.mul_((len(old) / len(weight)) ** 0.5)
            continue
        if name.endswith(WRITERS):
            weight.zero_()
        weight[: old.shape[0], : old.shape[1]] = old

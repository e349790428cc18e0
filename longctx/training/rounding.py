"""What keys and values look like after a codec, for judging models without the engine.

`keys` and `values` are [..., head_dim]; the recipes are those of the engine's codecs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor


def _hadamard(dimension: int) -> Tensor:
    matrix: Tensor = torch.ones(1, 1)
    while matrix.shape[0] < dimension:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return cast(Tensor, matrix * dimension**-0.5)


def _symmetric(states: Tensor, levels: int) -> Tensor:
    scale = states.abs().amax(-1, keepdim=True).clamp_min(1e-8) / levels
    return (states / scale).round() * scale


def _asymmetric(states: Tensor, levels: int) -> Tensor:
    low, high = states.aminmax(dim=-1, keepdim=True)
    scale = (high - low).clamp_min(1e-8) / levels
    return ((states - low) / scale).round() * scale + low


def int8(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What int8 pages give back: one scale per token and head."""
    return _symmetric(keys, 127), _symmetric(values, 127)


def int4(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What int4 pages give back: keys rounded after a Hadamard transform, values as they are."""
    transform = _hadamard(keys.shape[-1])
    return _asymmetric(keys @ transform, 15) @ transform.T, _asymmetric(values, 15)


def int2(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """A bad codec on purpose: four levels for a whole head, no transform."""
    return _asymmetric(keys, 3), _asymmetric(values, 3)


CODECS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "raw": lambda keys, values: (keys, values),
    "int8": int8,
    "int4": int4,
    "int2": int2,
}

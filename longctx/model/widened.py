"""Computing with 16-bit weights as if they were float32: each is widened when it is taken.

It is as exact as a model that was loaded in float32, and slower; no weight is held twice.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

NARROW_TYPES = (torch.bfloat16, torch.float16)
PIECE_VALUES = 1 << 22  # of a linear layer's weights that are widened at once: 16 MiB


class Widened(TorchFunctionMode):
    """Lets every operation of torch see float32 in place of 16-bit numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._piece = torch.empty(0)  # the same memory for every piece: fresh pages cost more

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.dtype.__get__:  # type: ignore[attr-defined]
            dtype = func(*args)
            return torch.float32 if dtype in NARROW_TYPES else dtype
        if func is F.embedding:  # widens what it looked up, not the table
            return _wide(func(*args, **kwargs))
        if func is F.linear:
            return self._linear(*args, **kwargs)
        return func(*map(_wide, args), **{name: _wide(each) for name, each in kwargs.items()})

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x, bias = _wide(x), _wide(bias)
        if weight.dtype not in NARROW_TYPES:
            return F.linear(x, weight, bias)
        outputs, inputs = weight.shape
        rows = min(outputs, max(1, PIECE_VALUES // inputs))
        if self._piece.numel() < rows * inputs or self._piece.device != x.device:
            self._piece = torch.empty(rows * inputs, device=x.device)
        out = x.new_empty((*x.shape[:-1], outputs))
        for begin in range(0, outputs, rows):
            part = weight[begin : begin + rows]
            wide = self._piece[: part.numel()].view(part.shape).copy_(part)
            out[..., begin : begin + rows] = F.linear(x, wide)
        return out if bias is None else out.add_(bias)


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in NARROW_TYPES:
        return value.float()
    if isinstance(value, list | tuple) and any(isinstance(each, Tensor) for each in value):
        return type(value)(map(_wide, value))  # as torch.cat takes them
    return value

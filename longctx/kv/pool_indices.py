"""Rows or pages of a pool, named as cheaply as can be: a slice where they follow each other."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PoolIndices = slice | Tensor
"""A slice is used in place; a tensor [n] int64 looks each index up."""


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to the device; on a GPU the copy may still be under way."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def pool_indices(array: NDArray[np.int64], device: torch.device) -> PoolIndices:
    """The cheapest form of `array` [n]: [4, 5, 6] becomes slice(4, 7), [4, 6, 5] a tensor."""
    count = len(array)
    # The ends alone tell most arrays with gaps apart, without looking at all of them.
    if count and int(array[-1]) - int(array[0]) == count - 1 and bool((np.diff(array) == 1).all()):
        return slice(int(array[0]), int(array[0]) + count)
    return to_device(array, device)


def as_tensor(indices: PoolIndices) -> Tensor:
    """The indices as a tensor [n] int64 on a CPU, for code that takes no slice."""
    return torch.arange(indices.start, indices.stop) if isinstance(indices, slice) else indices

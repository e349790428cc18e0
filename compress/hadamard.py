"""The Hadamard transform, which spreads outliers of a key over its dims before it is rounded.

It is orthonormal, so dot products stay the same when both sides are transformed. Keys have a few
large dims; after the transform all are alike, and one scale fits them.
Source: QuaRot, https://arxiv.org/abs/2404.00456
"""

import torch
from torch import Tensor


def hadamard_dims(head_dim: int) -> int:
    """Dims of one transform: the largest power of two that divides head_dim."""
    return head_dim & -head_dim


def hadamard(rows: Tensor) -> Tensor:
    """Each run of `hadamard_dims` dims of float32 rows [..., head_dim], transformed.

    Rows of the matrix are in Sylvester's order. The transform is its own inverse.
    """
    dims = hadamard_dims(rows.shape[-1])
    half = 1
    while half < dims:
        pairs = torch.unflatten(rows, -1, (-1, 2, half))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        rows = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        half *= 2
    scaled: Tensor = rows * dims**-0.5
    return scaled

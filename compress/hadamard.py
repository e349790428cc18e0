"""The Hadamard transform, which spreads outliers of a key over its dims before it is rounded.

It is orthonormal, so dot products stay the same when both sides are transformed. Keys have a few
large dims; after the transform all dims are alike, and one scale fits them: (8, 0, 0, 0) becomes
(4, 4, 4, 4).
Source: QuaRot, https://arxiv.org/abs/2404.00456
"""

import torch
from torch import Tensor


def hadamard_dims(head_dim: int) -> int:
    """Return the dims of one transform: the largest power of two that divides `head_dim`.

    For 128 that is 128; for 96 it is 32, so 96 dims are three transforms side by side.
    """
    return head_dim & -head_dim


def hadamard(rows: Tensor) -> Tensor:
    """Transform each run of `hadamard_dims` dims of float32 rows [..., head_dim].

    The rows of the matrix are in Sylvester's order. The transform is its own inverse.
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

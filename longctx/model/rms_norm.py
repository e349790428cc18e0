"""RMS norms in one pass instead of six torch calls, for float32 and bfloat16 on a CPU.

At one row a norm is all overhead, and a model has two in each layer. `norm_fusing.py` finds them.
Source: Root Mean Square Layer Normalization, https://arxiv.org/abs/1910.07467
"""

import torch
from torch import Tensor, nn

from longctx.kernels import _kernels
from longctx.model.norm_fusing import fuse_norms


class RMSNorm(nn.Module):
    """Computes `x / sqrt(mean(x^2) + epsilon) * weight` over the last dimension, in float32.

    `dtype` is the type of rows and results. bfloat16 ones are rounded once, or before `weight` too
    where `twice` says so.
    """

    def __init__(
        self,
        weight: Tensor,
        epsilon: float,
        *,
        dtype: torch.dtype = torch.float32,
        twice: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
        self.epsilon, self.dtype, self.twice = epsilon, dtype, twice
        self.factors = weight.detach().float().contiguous()  # which need not be of `dtype`

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each row of `x` [..., width] by itself; rows of float32 in float32 always."""
        return self._normalized(x, None)[1]

    def after_sum(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of two [..., width], rounded, and its norm."""
        return self._normalized(x, y)

    def _normalized(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        width = self.factors.shape[0]
        assert x.shape[-1] == width
        wide = x.dtype == torch.float32
        assert wide or x.dtype == self.dtype
        if wide:  # `exact.py` calls its narrow numbers float32 too
            x, y = x.float(), None if y is None else y.float()
        x = sums = x.contiguous()
        out = torch.empty_like(x)
        if y is not None:
            assert y.shape == x.shape and y.dtype == x.dtype
            y, sums = y.contiguous(), torch.empty_like(x)
        addresses = (x.data_ptr(), 0 if y is None else y.data_ptr(), sums.data_ptr())
        shape = (x.numel() // width, width)
        norm = (self.factors.data_ptr(), self.epsilon)
        if wide:
            _kernels.rms_norm(*addresses, *shape, *norm, out.data_ptr())
        else:
            _kernels.rms_norm_bfloat16(*addresses, *shape, *norm, self.twice, out.data_ptr())
        return sums, out

    __call__ = forward  # a step makes many of these calls, and none has hooks


def fuse_rms_norms(model: nn.Module) -> int:
    """Replace every RMS norm of `model` in float32 or bfloat16; returns how many."""
    return fuse_norms(model, RMSNorm, types=(torch.float32, torch.bfloat16))

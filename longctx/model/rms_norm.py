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
        self._factors = weight.detach().float().contiguous()  # which need not be of `dtype`

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each row of `x` [..., width] by itself; rows of float32 in float32 always."""
        width = self._factors.shape[0]
        assert x.shape[-1] == width
        if x.dtype == torch.float32:
            x = x.float().contiguous()  # `exact.py` calls its narrow numbers float32 too
            out = torch.empty_like(x)
            _kernels.rms_norm(
                x.data_ptr(),
                x.numel() // width,
                width,
                self._factors.data_ptr(),
                self.epsilon,
                out.data_ptr(),
            )
            return out
        assert x.dtype == self.dtype
        x = x.contiguous()
        out = torch.empty_like(x)
        _kernels.rms_norm_bfloat16(
            x.data_ptr(),
            x.numel() // width,
            width,
            self._factors.data_ptr(),
            self.epsilon,
            self.twice,
            out.data_ptr(),
        )
        return out

    __call__ = forward  # see PackedLinear


def fuse_rms_norms(model: nn.Module) -> int:
    """Replace every RMS norm of `model` in float32 or bfloat16; returns how many."""
    return fuse_norms(model, RMSNorm, types=(torch.float32, torch.bfloat16))

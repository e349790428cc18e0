"""RMS norms in one pass instead of six torch calls, for float32 and bfloat16 on a CPU.

At one row a norm is all overhead, and a model has two in each layer. A class's name or source
decides nothing: a norm is replaced if its results equal ours on inputs of very different
magnitudes. Source: Root Mean Square Layer Normalization, https://arxiv.org/abs/1910.07467
"""

import inspect

import torch
from torch import Tensor, nn

from longctx.kernels import _kernels

EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon")
TYPES = (torch.float32, torch.bfloat16)
# Epsilon decides the result at the smallest magnitude, and vanishes at the largest.
MAGNITUDES = (1e-4, 1e-2, 1.0, 1e3)
TOLERANCE = 1e-5  # float32 sums in another order; a wrong epsilon or weight is far beyond
# In bfloat16 such sums turn the last bit of one number in ten thousand, and rounding at another
# place that of every third one. A bit that turns before the weight may turn another after it.
STEPS, SAME = 2**-6, 0.99


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


@torch.inference_mode()
def fuse_rms_norms(model: nn.Module) -> int:
    """Replace every module of `model` that is an RMS norm in `TYPES`; returns how many."""
    replaced = 0
    for path, module in list(model.named_modules()):
        fused = _fused(module)
        if fused is not None:
            model.set_submodule(path, fused)
            replaced += 1
    return replaced


def _fused(module: nn.Module) -> RMSNorm | None:
    """Build the norm whose results equal those of `module`; None where there is none."""
    names = [name for name, _ in module.named_parameters()]
    epsilons = [getattr(module, name) for name in EPSILON_NAMES if hasattr(module, name)]
    if names != ["weight"] or list(module.children()) or not epsilons:
        return None
    weight, epsilon = module.get_parameter("weight"), epsilons[0]
    takes_one = len(inspect.signature(module.forward).parameters) == 1
    if weight.dim() != 1 or weight.dtype not in TYPES or not isinstance(epsilon, float):
        return None
    if not takes_one or module.training or len(list(module.buffers())):
        return None
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 3, weight.shape[0], generator=generator)
    narrow = weight.dtype == torch.bfloat16
    wide = weight.float()
    for factors in (wide, 1 + wide):  # Gemma's weights are added to 1
        for twice in (True, False) if narrow else (False,):
            candidate = RMSNorm(factors, epsilon, dtype=weight.dtype, twice=twice)
            if all(
                _same(module, candidate, (base * magnitude).to(weight.dtype))
                for magnitude in MAGNITUDES
            ):
                return candidate
    return None


def _same(module: nn.Module, candidate: RMSNorm, x: Tensor) -> bool:
    wanted = module(x)
    if not isinstance(wanted, Tensor) or wanted.shape != x.shape or wanted.dtype != x.dtype:
        return False
    found = candidate(x)
    if wanted.dtype == torch.bfloat16:
        same = float((found == wanted).float().mean()) >= SAME
        return same and torch.allclose(found, wanted, rtol=STEPS, atol=0.0)
    return torch.allclose(found, wanted, rtol=TOLERANCE, atol=0.0)

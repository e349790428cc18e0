"""Finds the RMS norms of a model and puts those of a fused kernel in their place.

A class's name or source decides nothing: a norm is replaced if its results equal those of the
kernel on inputs of very different magnitudes.
"""

import inspect
from typing import Protocol

import torch
from torch import Tensor, nn

EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon")
# Epsilon decides the result at the smallest magnitude, and vanishes at the largest.
MAGNITUDES = (1e-4, 1e-2, 1.0, 1e3)
TOLERANCE = 1e-5  # float32 sums in another order; a wrong epsilon or weight is far beyond
# In bfloat16 such sums turn the last bit of one number in ten thousand, and rounding at another
# place that of every third one. A bit that turns before the weight may turn another after it.
# float16 has three more bits.
STEPS, SAME = {torch.bfloat16: 2**-6, torch.float16: 2**-9}, 0.99


class NormMaker(Protocol):
    """Makes the fused norm of some factors, as `RMSNorm` of either kind is made."""

    def __call__(
        self, weight: Tensor, epsilon: float, *, dtype: torch.dtype, twice: bool
    ) -> nn.Module: ...


@torch.inference_mode()
def fuse_norms(
    model: nn.Module, make: NormMaker, *, types: tuple[torch.dtype, ...], most_width: int = 1 << 30
) -> int:
    """Replace every module of `model` that is an RMS norm in `types`; returns how many.

    Rows of more than `most_width` numbers are left alone.
    """
    replaced = 0
    for path, module in list(model.named_modules()):
        fused = _fused(module, make, types, most_width)
        if fused is not None:
            model.set_submodule(path, fused)
            replaced += 1
    return replaced


def _fused(
    module: nn.Module, make: NormMaker, types: tuple[torch.dtype, ...], most_width: int
) -> nn.Module | None:
    """Build the norm whose results equal those of `module`; None where there is none."""
    names = [name for name, _ in module.named_parameters()]
    epsilons = [getattr(module, name) for name in EPSILON_NAMES if hasattr(module, name)]
    if names != ["weight"] or list(module.children()) or not epsilons:
        return None
    weight, epsilon = module.get_parameter("weight"), epsilons[0]
    takes_one = len(inspect.signature(module.forward).parameters) == 1
    if weight.dim() != 1 or weight.dtype not in types or not isinstance(epsilon, float):
        return None
    if not takes_one or module.training or len(list(module.buffers())):
        return None
    if len(weight) > most_width:
        return None
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 3, weight.shape[0], generator=generator).to(weight.device)
    wide = weight.float()
    for factors in (wide, 1 + wide):  # Gemma's weights are added to 1
        for twice in (True, False) if weight.dtype in STEPS else (False,):
            candidate = make(factors, epsilon, dtype=weight.dtype, twice=twice)
            if all(
                _same(module, candidate, (base * magnitude).to(weight.dtype))
                for magnitude in MAGNITUDES
            ):
                return candidate
    return None


def _same(module: nn.Module, candidate: nn.Module, x: Tensor) -> bool:
    wanted = module(x)
    if not isinstance(wanted, Tensor) or wanted.shape != x.shape or wanted.dtype != x.dtype:
        return False
    found = candidate(x)
    if wanted.dtype in STEPS:
        same = float((found == wanted).float().mean()) >= SAME
        return same and torch.allclose(found, wanted, rtol=STEPS[wanted.dtype], atol=0.0)
    return torch.allclose(found, wanted, rtol=TOLERANCE, atol=0.0)

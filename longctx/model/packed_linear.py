"""A model's linear layers, packed once at load for our own kernels (`kernels/csrc/linear.h`).

For models that compute in float32 on a CPU. The model stays transformers': each `nn.Linear` is
replaced by a `PackedLinear`, which computes the same. Weights that are bfloat16 numbers, as those
of most checkpoints are, stay 16 bits wide in memory and are widened in registers: exact, and half
the bytes to read. `--weights int8` rounds them to 8 bits. Read `pack_linears`.
"""

import torch
from torch import Tensor, nn

from longctx.config import Weights
from longctx.kernels import _kernels

if not _kernels.instruction_sets():
    raise ImportError("this CPU has none of the instruction sets that the kernels are compiled for")

# The numbers of the storage types in csrc/linear_kernels.h.
STORAGES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
INT8_MAX = 127


class PackedLinear(nn.Module):
    """A float32 `nn.Linear` whose result for a row does not depend on the rows beside it.

    It is used for inference only: it has no gradient and no hooks.
    """

    def __init__(self, linear: nn.Linear, weights: Weights, instruction_set: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scales = linear.weight.detach(), None
        assert weight.dtype == torch.float32, "other types are left to torch"
        if weights == "int8":
            weight, scales = quantize_rows(weight)
        elif torch.equal(narrow := weight.bfloat16(), weight):  # compares as float32
            weight = narrow
        weight = weight.contiguous()
        self.bias = linear.bias  # kept, as `weight`, for code that looks at it
        bias = None if linear.bias is None else linear.bias.detach().contiguous()
        self.stored = weight.dtype
        self._packed = _kernels.PackedLinear(
            weight.data_ptr(),
            0 if scales is None else scales.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            self.out_features,
            self.in_features,
            STORAGES[weight.dtype],
            instruction_set,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., in_features] to [..., out_features], both float32."""
        assert x.shape[-1] == self.in_features and x.dtype == torch.float32
        x = x.contiguous()
        out = x.new_empty((*x.shape[:-1], self.out_features))
        self._packed.forward(x.data_ptr(), x.numel() // self.in_features, out.data_ptr())
        return out

    __call__ = forward  # a step makes a hundred of these calls, and none has hooks

    @property
    def weight_bytes(self) -> int:
        """The memory of the packed weights, without scales and bias."""
        return self._packed.bytes

    @property
    def weight(self) -> Tensor:
        """The weights [out_features, in_features] float32, unpacked anew each time."""
        weight = torch.empty(self.out_features, self.in_features)
        self._packed.unpack(weight.data_ptr())
        return weight

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {str(self.stored).removeprefix('torch.')}"


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round `weight` [outputs, inputs] to int8, with one scale per output: symmetric, to nearest.

    The error of a weight is at most half its row's scale, which is its largest magnitude / 127.
    """
    scales = weight.abs().amax(dim=1) / INT8_MAX
    codes = (weight / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round()
    return codes.to(torch.int8), scales


def pack_linears(model: nn.Module, weights: Weights, *, instruction_set: str | None = None) -> int:
    """Replace every float32 `nn.Linear` in `model`; returns the bytes of the packed weights.

    They are replaced one after another, so that no more than one weight is in memory twice.
    Subclasses stay: they compute something else. `instruction_set` is one of
    `_kernels.instruction_sets()`, by default the fastest.
    """
    name = instruction_set or _kernels.instruction_sets()[-1]
    paths_of: dict[nn.Linear, list[str]] = {}  # a tied layer has several
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear and module.weight.dtype == torch.float32:
            paths_of.setdefault(module, []).append(path)
    packed_bytes = 0
    while paths_of:
        linear, paths = paths_of.popitem()
        packed = PackedLinear(linear, weights, name)
        packed_bytes += packed.weight_bytes
        for path in paths:
            model.set_submodule(path, packed)
    return packed_bytes

"""A model's linear layers, packed once at load for our own kernels (`kernels/csrc/linear/`).

For models that compute in float32 or bfloat16 on a CPU. The model stays transformers': each
`nn.Linear` is replaced by a `PackedLinear`, which computes the same. Weights that are bfloat16
numbers, as those of most checkpoints are, stay 16 bits wide in memory and are widened in registers:
exact, and half the bytes to read. Those of quantized GGUF files stay in the groups of their blocks.
`--weights` rounds weights to 8 or 4 bits. Weights in groups are integers with a scale, and on CPUs
with VNNI they are multiplied as such, which is faster: rows are rounded to 16 bits for that, each
32 numbers by the largest of them. Read `pack_linears`; for GGUF, `Packer`.
"""

from collections.abc import Iterator, Sequence
from typing import Self

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as TensorType
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from longctx.config import Activations, Weights
from longctx.kernels import _kernels
from longctx.model.gguf_blocks import Numbers, groups_of
from longctx.model.gguf_weights import Weight

if not _kernels.instruction_sets():
    raise ImportError("this CPU has none of the instruction sets that the kernels are compiled for")

# The numbers of the storage types in csrc/linear/kernels.h.
STORAGES = {torch.float32: 0, torch.bfloat16: 1}
BLOCKS = {
    TensorType.Q8_0: 2,
    TensorType.Q5_0: 2,  # a byte for five bits: exact, and faster than to put them together
    TensorType.Q5_1: 3,
    TensorType.Q5_K: 4,
    TensorType.Q6_K: 5,
    TensorType.Q4_0: 6,
    TensorType.Q4_1: 7,
    TensorType.Q4_K: 8,
}
INT8_MAX = 127
GROUP = 32  # inputs of rounded weights that share a scale
INT4_MAX = 15
PANEL = 16  # outputs that are stored together
TAKEN_APART = 1 << 22  # weights whose blocks are taken apart, or widened, at once
COMPUTE_TYPES = (torch.float32, torch.bfloat16)


def fastest_set(dtype: torch.dtype) -> str:
    """Name the fastest instruction set here for layers that compute in `dtype`.

    Without instructions for bfloat16 its rows are widened, and multiplied as float32.
    """
    sets: list[str] = _kernels.instruction_sets()
    if dtype == torch.bfloat16:
        sets += _kernels.bfloat16_sets()
    return sets[-1]


def multiplies_integers(dtype: torch.dtype, activations: Activations) -> bool:
    """Say whether layers of groups multiply integers, and round their rows for it.

    Rows of bfloat16 go through AMX where that is, which multiplies many of them faster.
    """
    tiles = dtype == torch.bfloat16 and "amx" in _kernels.bfloat16_sets()
    return activations == "auto" and not tiles and _kernels.multiplies_integers()


class PackedLinear(nn.Module):
    """A linear layer whose result for a row does not depend on the rows beside it.

    It is used for inference only: it has no gradient and no hooks.
    """

    def __init__(
        self,
        packed: _kernels.PackedLinear,
        shape: tuple[int, int],
        bias: Tensor | None,
        stored: str,
        *,
        dtype: torch.dtype,
        instruction_set: str,
        integers: bool = False,
    ) -> None:
        """`shape` is [outputs, inputs]; `packed` has a copy of `bias`. `dtype` is that of rows."""
        super().__init__()
        self.packed = packed
        pairs = instruction_set in _kernels.bfloat16_sets()
        assert dtype in COMPUTE_TYPES and not (pairs and dtype == torch.float32)
        self.dtype = dtype
        self.kernel_dtype = torch.bfloat16 if pairs else torch.float32
        self.instruction_set = instruction_set
        self.out_features, self.in_features = shape
        self.bias = bias  # kept, as `weight`, for code that looks at it
        self.stored = stored  # how a weight is stored, in words
        self.integers = integers

    @classmethod
    def of(
        cls, linear: nn.Linear, weights: Weights, instruction_set: str, *, integers: bool = False
    ) -> Self:
        """Pack the weights of a layer, as narrow as is exact or as `weights` asks.

        Nothing is rounded where the inputs are no whole groups. Rounded weights are multiplied as
        `integers`, or as floats.
        """
        weight = linear.weight.detach()
        assert weight.dtype in COMPUTE_TYPES, "other types are left to torch"
        if weights != "auto" and weight.shape[1] % GROUP == 0:
            return cls._rounded(linear, weights, instruction_set, integers)
        stored = weight.bfloat16()
        if not torch.equal(stored, weight):  # compares as float32
            stored = weight
        stored, bias = stored.contiguous(), _contiguous(linear.bias)
        outputs, inputs = weight.shape
        packed = _kernels.PackedLinear(
            stored.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            outputs,
            inputs,
            STORAGES[stored.dtype],
            instruction_set,
        )
        return cls(
            packed,
            (outputs, inputs),
            linear.bias,
            str(stored.dtype).removeprefix("torch."),
            dtype=weight.dtype,
            instruction_set=instruction_set,
        )

    @classmethod
    def _rounded(
        cls, linear: nn.Linear, weights: Weights, instruction_set: str, integers: bool
    ) -> Self:
        """Round weights, a piece at a time, and pack them as those of Q8_0 or Q4_1 files."""
        outputs, inputs = linear.weight.shape
        own = _contiguous(linear.bias)
        address = 0 if own is None else own.data_ptr()
        kind, rounded = ROUNDED[weights]
        packed = _kernels.PackedLinear(
            address, outputs, inputs, BLOCKS[kind], instruction_set, integers
        )
        for first, some in _pieces(outputs, inputs):
            weight = linear.weight[first : first + some].detach().float()
            codes, scales, minima = rounded(weight)
            packed.fill(
                first,
                some,
                codes.data_ptr(),
                scales.data_ptr(),
                0,
                0 if minima is None else minima.data_ptr(),
                0,
            )
        return cls(
            packed,
            (outputs, inputs),
            linear.bias,
            weights,
            dtype=linear.weight.dtype,
            instruction_set=instruction_set,
            integers=integers,
        )

    @classmethod
    def of_blocks(
        cls,
        kind: TensorType,
        rows: NDArray[np.uint8],
        bias: Tensor | None,
        instruction_set: str,
        *,
        dtype: torch.dtype = torch.float32,
        integers: bool = False,
    ) -> Self:
        """Pack quantized rows [outputs, bytes] at their own width, exact to their values.

        `integers` as in `of`.
        """
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        outputs, inputs = len(rows), rows.shape[1] // block_bytes * block
        own = _contiguous(bias)
        address = 0 if own is None else own.data_ptr()
        packed = _kernels.PackedLinear(
            address, outputs, inputs, BLOCKS[kind], instruction_set, integers
        )
        for first, some in _pieces(outputs, inputs):
            codes, scales, minima = groups_of(kind, rows[first : first + some])
            packed.fill(
                first,
                some,
                codes.ctypes.data,
                *_addresses(scales),
                *_addresses(minima),
            )
        return cls(
            packed,
            (outputs, inputs),
            bias,
            kind.name,
            dtype=dtype,
            instruction_set=instruction_set,
            integers=integers,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., in_features] to [..., out_features], both of the layer's type.

        A bfloat16 layer maps float32 rows too, exactly and slowly: `exact.py` wants that.
        """
        assert x.shape[-1] == self.in_features
        if x.dtype != self.dtype:
            return self._exactly(x.float())
        x = x.to(self.kernel_dtype).contiguous()
        out = x.new_empty((*x.shape[:-1], self.out_features))
        self.packed.forward(x.data_ptr(), x.numel() // self.in_features, out.data_ptr())
        return out.to(self.dtype)

    def _exactly(self, x: Tensor) -> Tensor:
        pieces = _pieces(self.out_features, self.in_features)
        parts = [torch.arange(first, first + some) for first, some in pieces]
        out = torch.cat([F.linear(x, self._rows(part)) for part in parts], dim=-1)
        return out if self.bias is None else out.add_(self.bias.float())

    def rows(self, ids: Tensor) -> Tensor:
        """The weights of some outputs: `ids` [...] int64 on the CPU to [..., in_features]."""
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.out_features:
            raise IndexError(f"row {int(ids.min())} or {int(ids.max())} of {self.out_features}")
        return self._rows(ids.contiguous()).to(self.dtype)

    def _rows(self, ids: Tensor) -> Tensor:
        out = torch.empty(*ids.shape, self.in_features)
        self.packed.rows(ids.data_ptr(), ids.numel(), out.data_ptr())
        return out

    @property
    def weight_bytes(self) -> int:
        """The memory of the packed weights, without bias and scales of outputs."""
        return self.packed.bytes

    @property
    def weight(self) -> Tensor:
        """The weights [out_features, in_features] in the layer's type, unpacked anew each time."""
        weight = torch.empty(self.out_features, self.in_features)
        self.packed.unpack(weight.data_ptr())
        return weight.to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.stored}"


class LinearGroup:
    """Several packed layers that map the same rows: one call, one piece of work for all threads."""

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        """Raises ValueError where they do not take the same rows."""
        first = layers[0]
        alike = {(each.dtype, each.kernel_dtype, each.in_features) for each in layers}
        if len(alike) != 1:
            raise ValueError("layers of other inputs, or types")
        self._inputs, self._dtype = first.in_features, first.dtype
        self._widens = first.kernel_dtype != first.dtype
        self._outputs = [each.out_features for each in layers]
        self._all_outputs = sum(self._outputs)
        self._group = _kernels.LinearGroup([each.packed for each in layers])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map `x` [..., inputs], of the layers' type, to the results [rows, outputs] of each."""
        assert x.shape[-1] == self._inputs and x.dtype == self._dtype
        if self._widens:
            x = x.float()
        x = x.contiguous()
        rows = x.numel() // self._inputs
        out = x.new_empty(rows * self._all_outputs)
        self._group.forward(x.data_ptr(), rows, out.data_ptr())
        if self._widens:
            out = out.to(self._dtype)
        parts = out.split_with_sizes([rows * each for each in self._outputs])
        return [part.view(rows, each) for part, each in zip(parts, self._outputs, strict=True)]


class PackedEmbedding(nn.Module):
    """An embedding whose rows are those of packed weights, which an output layer may share."""

    def __init__(self, linear: PackedLinear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, ids: Tensor) -> Tensor:
        """Look `ids` [...] up: [..., width] of the layer's type."""
        return self.linear.rows(ids)

    @property
    def weight(self) -> Tensor:
        """All rows, unpacked anew each time: for code that looks at them."""
        return self.linear.weight


class Packer:
    """Takes the matrices of a model as they are read from a GGUF file, and packs each at once."""

    def __init__(
        self, model_weights: Weights, dtype: torch.dtype, activations: Activations
    ) -> None:
        self._weights = model_weights
        self._dtype = dtype
        self._instruction_set = fastest_set(dtype)
        self._integers = multiplies_integers(dtype, activations)

    def keep(self, model: nn.Module, path: str, weight: Weight) -> bool:
        """Put a packed layer in the place of the one at `path`; False for what is no such layer.

        An embedding is packed too, and shared with an output layer that is tied to it.
        """
        module = model.get_submodule(path)
        output = model.get_output_embeddings()  # type: ignore[operator]
        if type(module) is nn.Linear:
            packed = self._pack(weight, module.bias, output=module is output)
            model.set_submodule(path, packed)
            return True
        if not isinstance(module, nn.Embedding):
            return False
        tied = model.config.tie_word_embeddings and type(output) is nn.Linear  # type: ignore
        plain = type(module) is nn.Embedding
        if not tied and not plain:
            return False
        packed = self._pack(weight, None, output=bool(tied))
        if tied:
            model.set_submodule("lm_head", packed)
        if plain:
            model.set_submodule(path, PackedEmbedding(packed))
        return plain

    def _pack(self, weight: Weight, bias: Tensor | None, *, output: bool) -> PackedLinear:
        kind = weight.tensor.type
        if self._weights == "auto" and kind in BLOCKS:
            return PackedLinear.of_blocks(
                kind,
                weight.blocks(),
                bias,
                self._instruction_set,
                dtype=self._dtype,
                integers=self._integers,
            )
        values = torch.from_numpy(weight.values()).to(self._dtype)
        layer = nn.Linear(values.shape[1], values.shape[0], device="meta")
        layer.weight = nn.Parameter(values, requires_grad=False)
        layer.bias = bias  # type: ignore[assignment]
        return PackedLinear.of(
            layer, _kept(self._weights, output), self._instruction_set, integers=self._integers
        )


def packed_bytes(model: nn.Module) -> int:
    """The memory of all packed weights in `model`, shared ones once."""
    layers = {module for module in model.modules() if isinstance(module, PackedLinear)}
    return sum(layer.weight_bytes for layer in layers)


def _kept(weights: Weights, output: bool) -> Weights:
    """Return what a layer is rounded to: the output layer, by which tokens are told, to 8 bits."""
    return "int8" if weights == "int4" and output else weights


def _pieces(outputs: int, inputs: int) -> Iterator[tuple[int, int]]:
    """Yield the first output and the number of outputs of what is worked on at once."""
    step = max(1, TAKEN_APART // inputs // PANEL) * PANEL
    for first in range(0, outputs, step):
        yield first, min(step, outputs - first)


def _addresses(numbers: Numbers | None) -> tuple[int, int]:
    own, common = (None, None) if numbers is None else numbers
    return (0 if own is None else own.ctypes.data, 0 if common is None else common.ctypes.data)


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float().contiguous()


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor, None]:
    """Round `weight` [outputs, inputs] to 8 bits, in groups of 32 inputs with a scale.

    Returns codes [outputs, inputs] int8 and scales [outputs, groups] float16: a weight is scale *
    code, as in GGUF's Q8_0. Scales are rounded first, and codes with them.
    """
    groups = weight.reshape(len(weight), -1, GROUP)
    scales = (groups.abs().amax(dim=2) / INT8_MAX).half()
    codes = (groups / _steps(scales)).round().clamp(-INT8_MAX, INT8_MAX)
    return codes.flatten(1).to(torch.int8), scales.contiguous(), None


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round `weight` [outputs, inputs] to 4 bits, in groups of 32 inputs with scale and minimum.

    Returns codes [outputs, inputs] uint8, and scales and minima [outputs, groups] float16: a weight
    is scale * code + minimum, as in GGUF's Q4_1. Scales are rounded first, and codes with them.
    """
    groups = weight.reshape(len(weight), -1, GROUP)
    least, most = groups.aminmax(dim=2)
    minima = least.half()
    scales = ((most - minima.float()) / INT4_MAX).half()
    codes = ((groups - minima.float()[..., None]) / _steps(scales)).round().clamp(0, INT4_MAX)
    return codes.flatten(1).to(torch.uint8), scales.contiguous(), minima.contiguous()


def _steps(scales: Tensor) -> Tensor:
    """Widen scales [outputs, groups] to what weights of a group are divided by."""
    return scales.float().clamp_min(torch.finfo(torch.float32).tiny)[..., None]


ROUNDED = {"int8": (TensorType.Q8_0, quantize_int8), "int4": (TensorType.Q4_1, quantize_int4)}


def pack_linears(
    model: nn.Module,
    weights: Weights,
    activations: Activations = "auto",
    *,
    instruction_set: str | None = None,
) -> None:
    """Replace every `nn.Linear` in `model` that computes in float32 or bfloat16.

    They are replaced one after another, so that no more than one weight is in memory twice.
    Subclasses stay: they compute something else. An embedding that is tied to a layer then looks
    its rows up in the packed weights, unless those are rounded. `instruction_set` is by default the
    fastest.
    """
    output = None
    if isinstance(model, PreTrainedModel):
        output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    paths_of: dict[nn.Linear, list[str]] = {}  # a tied layer has several
    embeddings: dict[Tensor, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear and module.weight.dtype in COMPUTE_TYPES:
            paths_of.setdefault(module, []).append(path)
        elif type(module) is nn.Embedding and module.max_norm is None:
            embeddings.setdefault(module.weight, []).append(path)
    while paths_of:
        linear, paths = paths_of.popitem()
        name = instruction_set or fastest_set(linear.weight.dtype)
        packed = PackedLinear.of(
            linear,
            _kept(weights, linear is output),
            name,
            integers=multiplies_integers(linear.weight.dtype, activations),
        )
        for path in paths:
            model.set_submodule(path, packed)
        if weights == "auto":
            for path in embeddings.pop(linear.weight, ()):
                model.set_submodule(path, PackedEmbedding(packed))

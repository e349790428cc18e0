"""Quantized weights stay in their blocks, and compute exactly as what they dequantize to."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as TensorType
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from longctx.model.gguf_blocks import READERS, groups_of
from longctx.model.gguf_file import QUANTIZED

_kernels = pytest.importorskip("longctx.kernels._kernels")

from longctx.model.packed_linear import BLOCKS, PackedLinear  # noqa: E402

INSTRUCTION_SETS = _kernels.instruction_sets()
KINDS = st.sampled_from(QUANTIZED)


def any_blocks(kind: TensorType, rows: int, blocks: int, seed: int) -> NDArray[np.uint8]:
    """Blocks of any bytes whose halves are numbers."""
    generator = np.random.default_rng(seed)
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    data = generator.integers(0, 256, (rows, blocks, block_bytes), np.uint8)
    places = {TensorType.Q6_K: (208,)}.get(kind, (0, 2))
    for at in places if kind.name.endswith(("_1", "_K")) else (0,):
        halves = generator.normal(0, 0.01, (rows, blocks, 1)).astype(np.float16)
        data[..., at : at + 2] = halves.view(np.uint8)
    return data.reshape(rows, -1)


def dequantized(kind: TensorType, rows: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.asarray(gguf.dequantize(rows, kind), np.float32))


def test_every_quantized_type_can_be_packed() -> None:
    assert set(BLOCKS) == set(READERS) == set(QUANTIZED)


@settings(deadline=None, max_examples=100)
@given(kind=KINDS, rows=st.integers(1, 40), blocks=st.integers(1, 4), seed=st.integers(0, 1000))
def test_groups_give_the_values_of_the_formats_own_package(
    kind: TensorType, rows: int, blocks: int, seed: int
) -> None:
    data = any_blocks(kind, rows, blocks, seed)
    codes, scales, minima = groups_of(kind, data)
    codes = codes.astype(np.float32) - (8 if kind == TensorType.Q4_0 else 0)
    factors = scales.values()
    values = codes.reshape(*factors.shape, -1) * factors[..., None]
    if minima is not None:
        values = values + minima.values()[..., None]
    assert np.array_equal(values.reshape(rows, -1), gguf.dequantize(data, kind))


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@settings(deadline=None, max_examples=150)
@given(
    kind=KINDS,
    rows=st.integers(0, 30) | st.integers(90, 110),
    outputs=st.integers(1, 70) | st.integers(120, 140),
    blocks=st.integers(1, 30),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_quantized_layer_has_the_bits_of_the_float32_one(
    instruction_set: str,
    kind: TensorType,
    rows: int,
    outputs: int,
    blocks: int,
    bias: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    if gguf.GGML_QUANT_SIZES[kind][0] > 32:
        blocks = min(blocks, 4)
    data = any_blocks(kind, outputs, blocks, seed)
    weight = dequantized(kind, data)
    added = torch.randn(outputs) if bias else None
    packed = PackedLinear.of_blocks(kind, data, added, instruction_set)
    assert torch.equal(packed.weight, weight)
    wide = nn.Linear(weight.shape[1], outputs, bias=bias).requires_grad_(False)
    wide.weight.copy_(weight)
    if added is not None:
        wide.bias.copy_(added)
    x = torch.randn(rows, weight.shape[1])
    assert torch.equal(packed(x), PackedLinear.of(wide, "auto", instruction_set)(x))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_rows_are_looked_up(kind: TensorType) -> None:
    data = any_blocks(kind, 50, 2, 0)
    packed = PackedLinear.of_blocks(kind, data, None, INSTRUCTION_SETS[-1])
    ids = torch.tensor([[3, 49, 0], [16, 15, 3]])
    assert torch.equal(packed.rows(ids), dequantized(kind, data)[ids])
    assert packed.rows(ids[:0]).shape == (0, 3, packed.in_features)
    with pytest.raises(IndexError):
        packed.rows(torch.tensor([50]))


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        (TensorType.Q4_0, 4.5),
        (TensorType.Q4_1, 5.0),
        (TensorType.Q8_0, 8.5),
        (TensorType.Q4_K, 4.625),  # 4.5 in the file, whose scales have 6 bits
        (TensorType.Q5_K, 8.625),
        (TensorType.Q6_K, 8.5625),
    ],
)
def test_weights_take_their_own_width(kind: TensorType, bits: float) -> None:
    packed = PackedLinear.of_blocks(kind, any_blocks(kind, 64, 2, 0), None, INSTRUCTION_SETS[-1])
    assert 8 * packed.weight_bytes / (64 * packed.in_features) == bits

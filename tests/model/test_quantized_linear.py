"""Quantized weights stay in their blocks, and compute exactly as what they dequantize to."""

from typing import Any

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

from longctx.model.packed_linear import (  # noqa: E402
    BLOCKS,
    LinearGroup,
    PackedLinear,
    multiplies_integers,
)

INSTRUCTION_SETS = _kernels.instruction_sets()
BF16 = torch.bfloat16
GROUP = 32
KINDS = st.sampled_from(QUANTIZED)
LAYERS: dict[str, st.SearchStrategy[Any]] = {
    "kind": KINDS,
    "rows": st.integers(0, 30) | st.integers(90, 110),
    "outputs": st.integers(1, 70) | st.integers(120, 140),
    "blocks": st.integers(1, 30),
    "bias": st.booleans(),
    "seed": st.integers(0, 1000),
}


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
@given(**LAYERS)
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


# -- rows of 16 bits ------------------------------------------------------------------------------


def steps_of(x: Tensor, largest: int = 32767) -> tuple[Tensor, Tensor]:
    """The slow twin: steps [rows, groups, 32], at most `largest`, and scales [rows, groups, 1]."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    most = groups.abs().amax(-1, keepdim=True)
    steps = torch.full_like(most, largest)  # a tensor, since torch inverts what divides a number
    inverse = torch.where(most < 1e-30, 0.0, steps / most)
    return (groups * inverse).round().double(), torch.where(most < 1e-30, 0.0, most / steps)


def integer_layer(
    kind: TensorType, outputs: int, blocks: int, seed: int, bias: Tensor | None = None
) -> tuple[PackedLinear, Tensor]:
    """A layer of any blocks that multiplies integers, and its weights."""
    data = any_blocks(kind, outputs, blocks, seed)
    packed = PackedLinear.of_blocks(kind, data, bias, INSTRUCTION_SETS[-1], integers=True)
    return packed, dequantized(kind, data)


needs_integers = pytest.mark.skipif(
    not _kernels.multiplies_integers(), reason="this CPU has no VNNI"
)


@needs_integers
@settings(deadline=None, max_examples=200)
@given(**LAYERS, magnitude=st.sampled_from([1e-35, 1e-6, 1.0, 1e6]))
def test_rows_are_rounded_to_16_bits_and_nothing_else(
    kind: TensorType,
    rows: int,
    outputs: int,
    blocks: int,
    bias: bool,
    magnitude: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    if gguf.GGML_QUANT_SIZES[kind][0] > 32:
        blocks = min(blocks, 4)
    added = torch.randn(outputs) if bias else None
    packed, weight = integer_layer(kind, outputs, blocks, seed, added)
    assert torch.equal(packed.weight, weight)
    x = torch.randn(rows, weight.shape[1]) * magnitude
    x[:, :GROUP] = 0
    steps, scales = steps_of(x)
    rounded = (steps * scales).flatten(-2)
    exact = rounded @ weight.double().T
    # Of each group the sum of products, and that of minima, are added to what came before: each of
    # these operations is off by half of float32's last bit of all that can have been added.
    codes, factors, minima = groups_of(kind, any_blocks(kind, outputs, blocks, seed))
    numbers = np.abs(codes.astype(np.float64).reshape(*factors.values().shape, -1))
    parts = (numbers + 8) * np.abs(factors.values())[..., None]
    if minima is not None:
        parts = parts + np.abs(minima.values())[..., None]
    terms = rounded.abs() @ torch.from_numpy(parts).reshape(outputs, -1).T
    if added is not None:
        exact, terms = exact + added, terms + added.abs()
    found = packed(x)
    assert found.shape == exact.shape
    operations = 3 + 2 * factors.values().shape[1]
    assert bool(((found - exact).abs() <= 2**-24 * operations * terms + 1e-37).all())


@needs_integers
@pytest.mark.parametrize("kind", QUANTIZED)
def test_what_is_multiplied_are_rows_of_16_bits(kind: TensorType) -> None:
    torch.manual_seed(3)
    packed, weight = integer_layer(kind, 60, 1, 1)
    x = torch.randn(20, weight.shape[1])
    found = packed(x)

    def distance(steps: int) -> float:
        rounded, scales = steps_of(x, steps)
        return float((found - (rounded * scales).flatten(-2) @ weight.double().T).norm())

    nearest = distance(32767)
    assert all(distance(other) > 5 * nearest for other in (127, 16383, 32766, 65535, 2**22))


@needs_integers
@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_row_of_16_bits_has_the_same_bits_in_every_batch(kind: TensorType) -> None:
    torch.manual_seed(5)
    packed, weight = integer_layer(kind, 70, 3, 1)
    x = torch.randn(50, weight.shape[1])
    whole = packed(x)
    for first, last in ((0, 1), (3, 7), (11, 24), (24, 50), (49, 50)):
        assert torch.equal(packed(x[first:last]), whole[first:last])
    # ... and beside other layers, also those that multiply floats
    floats = PackedLinear.of(nn.Linear(weight.shape[1], 20), "auto", INSTRUCTION_SETS[-1])
    one, two, three = LinearGroup([packed, floats, packed]).forward(x)
    assert torch.equal(one, whole) and torch.equal(three, whole) and torch.equal(two, floats(x))


@needs_integers
def test_what_is_no_number_stays_so_in_its_row_alone() -> None:
    packed, weight = integer_layer(TensorType.Q4_1, 40, 3, 1)
    x = torch.randn(20, weight.shape[1])
    whole = packed(x)
    x[3, 40], x[7, 0], x[9, 95] = torch.nan, torch.inf, -torch.inf
    found = packed(x)
    lost = torch.zeros(20, dtype=torch.bool)
    lost[[3, 7, 9]] = True
    assert bool(found[lost].isnan().all()) and torch.equal(found[~lost], whole[~lost])


@needs_integers
@pytest.mark.parametrize("instruction_set", [*INSTRUCTION_SETS, *_kernels.bfloat16_sets()])
def test_bfloat16_rows_are_multiplied_as_integers_too(instruction_set: str) -> None:
    torch.manual_seed(6)
    data = any_blocks(TensorType.Q4_0, 40, 5, 2)
    bias = torch.randn(40)
    packed = PackedLinear.of_blocks(
        TensorType.Q4_0, data, bias, instruction_set, dtype=BF16, integers=True
    )
    wide = PackedLinear.of_blocks(TensorType.Q4_0, data, bias, INSTRUCTION_SETS[-1], integers=True)
    x = torch.randn(30, packed.in_features).to(BF16)
    assert torch.equal(packed(x), wide(x.float()).to(BF16))


def test_tiles_multiply_rows_of_bfloat16_and_integers_all_others() -> None:
    able, tiles = _kernels.multiplies_integers(), "amx" in _kernels.bfloat16_sets()
    assert multiplies_integers(torch.float32, "auto") == able
    assert multiplies_integers(BF16, "auto") == (able and not tiles)
    assert not multiplies_integers(torch.float32, "exact")


@pytest.mark.skipif(_kernels.multiplies_integers(), reason="this CPU has VNNI")
def test_integers_are_refused_where_the_cpu_cannot_multiply_them() -> None:
    with pytest.raises(ValueError, match="VNNI"):
        integer_layer(TensorType.Q8_0, 16, 1, 0)

"""Linear layers that compute in bfloat16 against the obvious product in float64."""

from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as TensorType
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from longctx.config import ModelConfig, Weights
from longctx.model.gguf_file import QUANTIZED
from longctx.model.loader import load_model
from tests.model.test_quantized_linear import any_blocks, dequantized
from tests.support.tiny_models import write_model

_kernels = pytest.importorskip("longctx.kernels._kernels")

from longctx.model.packed_linear import (  # noqa: E402
    PackedEmbedding,
    PackedLinear,
    fastest_set,
    pack_linears,
    packed_bytes,
)

# Those with instructions for bfloat16, and those that widen
SETS = [*_kernels.instruction_sets(), *_kernels.bfloat16_sets()]
ROWS = st.integers(0, 40) | st.integers(90, 110) | st.integers(500, 530)
BF16 = torch.bfloat16
HALF_STEP = 2**-8  # of 8 significant bits: the rounding of a result, relative to it
TINY = 2.0**-126  # what is smaller is 0 to these instructions


def layer(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    made = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    made.weight.copy_(torch.randn(outputs, inputs))
    return made.to(BF16)


def check(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Compare with the slow twin: float64, then rounded once."""
    wanted = x.double() @ weight.double().T
    terms = x.double().abs() @ weight.double().abs().T + 1
    if bias is not None:
        wanted, terms = wanted + bias.double(), terms + bias.double().abs()
    # One rounding for each product and sum, then that of the result
    sums = (x.shape[-1] + 4) * torch.finfo(torch.float32).eps * terms
    bound = sums + (wanted.abs() + sums) * HALF_STEP * 1.001 + TINY
    assert found.dtype == BF16
    assert ((found.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("instruction_set", SETS)
@settings(deadline=None, max_examples=60)
@given(
    rows=ROWS,
    inputs=st.integers(1, 70) | st.integers(500, 520) | st.integers(1020, 1100),
    outputs=st.integers(1, 70) | st.integers(250, 300),
    bias=st.booleans(),
    weights=st.sampled_from(["auto", "int8"]),
    seed=st.integers(0, 1000),
)
def test_a_packed_layer_computes_what_the_plain_one_does(
    instruction_set: str,
    rows: int,
    inputs: int,
    outputs: int,
    bias: bool,
    weights: Weights,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    if weights == "int8":
        inputs = -(-inputs // 32) * 32  # whole groups, or nothing is rounded
    linear = layer(inputs, outputs, bias=bias)
    packed = PackedLinear.of(linear, weights, instruction_set)
    x = torch.randn(rows, inputs).to(BF16)
    # Where rows are widened, weights stay as exact as they are stored
    rounded = instruction_set in _kernels.bfloat16_sets()
    exact = packed.weight if rounded else packed._rows(torch.arange(outputs))
    if weights == "auto":
        assert torch.equal(packed.weight, linear.weight) and packed.weight.dtype == BF16
    check(packed(x), x, exact, linear.bias)


@pytest.mark.parametrize("instruction_set", SETS)
@settings(deadline=None, max_examples=80)
@given(
    kind=st.sampled_from(QUANTIZED),
    rows=ROWS,
    outputs=st.integers(1, 70) | st.integers(120, 140),
    blocks=st.integers(1, 40),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_quantized_layer_computes_with_its_weights_rounded_once(
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
        blocks = min(blocks, 5)
    data = any_blocks(kind, outputs, blocks, seed)
    values = dequantized(kind, data)
    added = torch.randn(outputs).to(BF16) if bias else None
    packed = PackedLinear.of_blocks(kind, data, added, instruction_set, dtype=BF16)
    assert torch.equal(packed.weight, values.to(BF16))
    x = torch.randn(rows, values.shape[1]).to(BF16)
    # Where rows are widened, weights stay as exact as they are stored
    rounded = instruction_set in _kernels.bfloat16_sets()
    check(packed(x), x, values.to(BF16) if rounded else values, added)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("stored", ["auto", "int8", "Q4_0", "Q6_K"])
def test_a_row_has_the_same_bits_in_every_batch(instruction_set: str, stored: str) -> None:
    torch.manual_seed(0)
    if stored in ("auto", "int8"):
        weights: Weights = "int8" if stored == "int8" else "auto"
        packed = PackedLinear.of(layer(1024, 300, bias=True), weights, instruction_set)
    else:
        data = any_blocks(TensorType[stored], 300, 32 if stored == "Q4_0" else 4, 0)
        packed = PackedLinear.of_blocks(TensorType[stored], data, None, instruction_set, dtype=BF16)
    x = torch.randn(1050, 1024).to(BF16)
    whole = packed(x)
    for rows in (1, 2, 3, 11, 12, 13, 16, 17, 31, 32, 33, 48, 200, 512, 513, 700):
        assert torch.equal(packed(x[:rows]), whole[:rows])
        assert torch.equal(packed(x[-rows:]), whole[-rows:])


@pytest.mark.parametrize("instruction_set", SETS)
def test_what_is_no_number_stays_so_in_its_row_alone(instruction_set: str) -> None:
    packed = PackedLinear.of(layer(70, 40), "auto", instruction_set)
    x = torch.randn(20, 70).to(BF16)
    wanted = packed(x)
    x[3, 5], x[4, 6] = float("nan"), float("inf")
    found = packed(x)
    assert found[3].isnan().all() and not found[4].isfinite().any()
    others = [row for row in range(20) if row not in (3, 4)]
    assert torch.equal(found[others], wanted[others])


def test_torch_multiplies_between_our_calls() -> None:
    # Both set up the matrix unit for themselves, and neither may rely on what the other left.
    packed = PackedLinear.of(layer(256, 256), "auto", fastest_set(BF16))
    plain = layer(256, 256)
    x = torch.randn(48, 256).to(BF16)
    ours, torchs = packed(x), plain(x)
    for rows in (48, 3, 48, 17, 1, 48):
        assert torch.equal(packed(x[:rows]), ours[:rows])
        torch.testing.assert_close(plain(x[:rows]), torchs[:rows])


def test_rows_of_float32_are_mapped_exactly() -> None:
    linear = layer(300, 50, bias=True)
    packed = PackedLinear.of(linear, "auto", fastest_set(BF16))
    x = torch.randn(2, 5, 300)
    torch.testing.assert_close(packed(x), linear.float()(x))


def test_a_tied_embedding_shares_the_packed_weights() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(100, 64, dtype=BF16)
            self.head = nn.Linear(64, 100, bias=False, dtype=BF16)
            self.head.weight = self.embed.weight

    model = Model().requires_grad_(False)
    table = model.embed.weight.clone()
    pack_linears(model, "auto")
    assert isinstance(model.embed, PackedEmbedding) and model.embed.linear is model.head
    assert not list(model.parameters())
    assert packed_bytes(model) == 112 * 64 * 2  # outputs come by sixteens
    ids = torch.tensor([[3, 99], [0, 50]])
    assert torch.equal(model.embed(ids), table[ids])


def test_rounded_weights_take_half_the_memory_in_bfloat16_too(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    exact, rounded = (
        load_model(ModelConfig(weights=weights, device="cpu", dtype="bfloat16"), folder).spec
        for weights in ("auto", "int8")
    )
    assert exact.dtype == rounded.dtype == BF16
    assert exact.fingerprint != rounded.fingerprint
    assert rounded.weight_bytes < exact.weight_bytes

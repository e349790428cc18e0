"""Packed linear layers against the obvious product in float64."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from longctx.config import ModelConfig, Weights
from longctx.errors import ModelRefused
from longctx.model.loader import load_model
from tests.support.tiny_models import write_model

_kernels = pytest.importorskip("longctx.kernels._kernels")

from longctx.model.packed_linear import (  # noqa: E402
    PackedLinear,
    pack_linears,
    packed_bytes,
    quantize_int4,
    quantize_int8,
)

INSTRUCTION_SETS = _kernels.instruction_sets()


def layer(inputs: int, outputs: int, *, bias: bool = False, bf16: bool = False) -> nn.Linear:
    made = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    made.weight.copy_(torch.randn(outputs, inputs))
    if bf16:
        made.weight.copy_(made.weight.bfloat16())
    return made


def plain(linear: nn.Linear | PackedLinear, bias: Tensor | None, x: Tensor) -> Tensor:
    """The slow twin: float64, from the weights as they are stored."""
    product = x.double() @ linear.weight.double().T
    return product if bias is None else product + bias.double()


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 30) | st.integers(90, 200),
    inputs=st.integers(1, 70) | st.integers(380, 390) | st.integers(760, 800),
    outputs=st.integers(1, 70) | st.integers(120, 140),
    bias=st.booleans(),
    kind=st.sampled_from(["float32", "bfloat16", "int8", "int4"]),
    seed=st.integers(0, 1000),
)
def test_a_packed_layer_computes_what_the_plain_one_does(
    instruction_set: str, rows: int, inputs: int, outputs: int, bias: bool, kind: str, seed: int
) -> None:
    torch.manual_seed(seed)
    rounded = kind in ("int8", "int4")
    if rounded:
        inputs = -(-inputs // 32) * 32  # whole groups, or nothing is rounded
    linear = layer(inputs, outputs, bias=bias, bf16=kind == "bfloat16")
    packed = PackedLinear.of(linear, kind if rounded else "auto", instruction_set)
    assert packed.stored == kind
    x = torch.randn(rows, inputs)
    wanted = plain(packed, linear.bias, x)
    # One rounding per product and sum, of terms whose magnitudes add up to `terms`
    terms = x.double().abs() @ packed.weight.double().abs().T + 1
    bound = (inputs + 4) * torch.finfo(torch.float32).eps * terms
    assert ((packed(x).double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
def test_a_row_has_the_same_bits_in_every_batch(instruction_set: str, weights: Weights) -> None:
    torch.manual_seed(0)
    packed = PackedLinear.of(layer(896, 100, bias=True), weights, instruction_set)
    x = torch.randn(301, 896)
    whole = packed(x)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 13, 96, 97, 200):
        assert torch.equal(packed(x[:rows]), whole[:rows])
        assert torch.equal(packed(x[-rows:]), whole[-rows:])


@pytest.mark.parametrize(
    ("bf16", "weights", "stored", "bits"),
    [
        (False, "auto", "float32", 32),
        (True, "auto", "bfloat16", 16),
        (True, "int8", "int8", 8.5),
        (False, "int8", "int8", 8.5),
        (False, "int4", "int4", 5),
    ],
)
def test_weights_are_kept_as_narrow_as_is_exact_or_was_asked(
    bf16: bool, weights: Weights, stored: str, bits: float
) -> None:
    linear = layer(64, 33, bf16=bf16)
    packed = PackedLinear.of(linear, weights, INSTRUCTION_SETS[-1])
    assert packed.stored == stored
    assert packed.weight_bytes == 64 * 48 * bits / 8  # outputs come by sixteens
    if weights == "auto":
        assert torch.equal(packed.weight, linear.weight)


@settings(deadline=None, max_examples=60)
@given(
    outputs=st.integers(1, 40),
    groups=st.integers(1, 5),
    magnitude=st.sampled_from([1e-3, 1.0, 100.0]),
    weights=st.sampled_from(["int8", "int4"]),
    seed=st.integers(0, 1000),
)
def test_a_weight_errs_by_at_most_half_a_step_and_the_rounding_of_its_scales(
    outputs: int, groups: int, magnitude: float, weights: Weights, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(outputs, 32 * groups) * magnitude
    weight[0] = 0
    weight[-1] = 7.0  # all the same
    codes, scales, minima = (quantize_int8 if weights == "int8" else quantize_int4)(weight)
    step = scales.float().repeat_interleave(32, dim=1)
    found = step * codes
    if minima is not None:
        found += minima.float().repeat_interleave(32, dim=1)
    largest = weight.unflatten(1, (-1, 32)).abs().amax(2).repeat_interleave(32, dim=1)
    # Halves have 11 bits: all steps are off by as much of the range, the minimum of itself. The
    # smallest are 2**-24 apart, which the steps multiply
    smallest = 127 * 2**-25 if weights == "int8" else 1e-6
    bound = 0.5 * step + 2**-10 * largest + smallest
    assert ((found - weight).abs() <= bound).all()
    assert codes.abs().max() == 127 if weights == "int8" else codes.max() <= 15
    linear = nn.Linear(32 * groups, outputs, bias=False).requires_grad_(False)
    linear.weight.copy_(weight)
    packed = PackedLinear.of(linear, weights, INSTRUCTION_SETS[-1])
    assert torch.equal(packed.weight, found) and packed.stored == weights


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_inputs_that_are_no_whole_groups_are_not_rounded(weights: Weights) -> None:
    linear = layer(40, 8)
    packed = PackedLinear.of(linear, weights, INSTRUCTION_SETS[-1])
    assert packed.stored == "float32" and torch.equal(packed.weight, linear.weight)


def test_int4_keeps_8_bits_for_the_output(tmp_path: Path) -> None:
    folder = write_model(tmp_path, hidden_size=64, intermediate_size=96)
    config = ModelConfig(weights="int4", device="cpu", dtype="float32")
    layers = load_model(config, folder).transformer.named_modules()
    stored = {name: each.stored for name, each in layers if isinstance(each, PackedLinear)}
    assert stored.pop("lm_head") == "int8"
    assert set(stored.values()) == {"int4"}


def test_inputs_of_any_shape_and_stride_are_taken() -> None:
    linear = layer(24, 10)
    packed = PackedLinear.of(linear, "auto", INSTRUCTION_SETS[-1])
    x = torch.randn(2, 24, 5).transpose(1, 2)
    torch.testing.assert_close(packed(x), linear(x))
    assert packed(torch.randn(24)).shape == (10,)


def test_only_plain_float32_layers_are_replaced_and_a_shared_one_stays_shared() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    shared = layer(8, 8)
    half = layer(8, 8).to(torch.float16)
    model = nn.ModuleDict({"a": shared, "b": shared, "own": Doubled(8, 8), "halved": half})
    pack_linears(model, "auto")
    assert packed_bytes(model) == 16 * 8 * 4
    assert isinstance(model["a"], PackedLinear)
    assert model["a"] is model["b"]
    assert type(model["own"]) is Doubled
    assert type(model["halved"]) is nn.Linear


def test_rounded_weights_are_another_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    exact, byte, nibble = (
        load_model(ModelConfig(weights=weights, device="cpu", dtype="float32"), folder).spec
        for weights in ("auto", "int8", "int4")
    )
    assert len({exact.fingerprint, byte.fingerprint, nibble.fingerprint}) == 3
    assert nibble.weight_bytes < byte.weight_bytes < exact.weight_bytes


def test_int8_is_refused_where_it_would_not_be_used(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="--dtype float32"):
        load_model(
            ModelConfig(weights="int8", device="cpu", dtype="float16"), write_model(tmp_path)
        )

"""Parts of layers in few calls, for CPUs: bit by bit what the modules in their places compute."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from longctx.config import ModelConfig
from longctx.model import loader
from longctx.model.exact import exact_twin
from longctx.model.layer_attention import AttentionCall, Place
from longctx.model.loader import LoadedModel, load_model
from tests.support.kept_attention import Kept
from tests.support.plain_attention import LENGTHS, packed_logits, some_tokens
from tests.support.tiny_models import ARCHITECTURES, write_model

_kernels = pytest.importorskip("longctx.kernels._kernels")

from longctx.model.cpu_layers import (  # noqa: E402
    HALVES,
    FusedAttention,
    FusedGate,
    FusedLayer,
)
from longctx.model.few_rows import FEW_ROWS  # noqa: E402
from longctx.model.layer_fusing import AttentionForm  # noqa: E402
from longctx.model.packed_linear import LinearGroup, PackedLinear, fastest_set  # noqa: E402
from longctx.model.rms_norm import RMSNorm  # noqa: E402

TYPES = [torch.float32, torch.bfloat16]
# Where little is recognized: what each of them does otherwise
OTHERS = {
    "gemma2": "norms of what is added",
    "gemma3_text": "norms of what is added",
    "exaone4": "norms of what is added",
    "cohere2": "one norm, and neighbors are turned in some layers",
    "olmo2": "norms of all heads together",
    "glm4": "neighbors are turned",
    "gpt_neox": "heads lie by turns in one layer",
    "gpt2": "layers of another class",
    "gpt_oss": "a clip within its experts",
}


def packed(inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool = False) -> PackedLinear:
    made = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False).to(dtype)
    return PackedLinear.of(made, "auto", fastest_set(dtype))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(0, 40) | st.integers(500, 530),
    inputs=st.integers(1, 70) | st.integers(250, 270),
    outputs=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_layers_in_one_call_compute_what_each_does(
    dtype: torch.dtype, rows: int, inputs: int, outputs: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    layers = [packed(inputs, each, dtype, bias=each % 2 == 0) for each in outputs]
    x = torch.randn(rows, inputs).to(dtype)
    for layer, found in zip(layers, LinearGroup(layers).forward(x), strict=True):
        assert torch.equal(found, layer(x))


def test_layers_of_other_inputs_are_no_group() -> None:
    with pytest.raises(ValueError, match="other inputs"):
        LinearGroup([packed(8, 3, torch.float32), packed(9, 3, torch.float32)])


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 769), (200, 576)])
def test_a_norm_of_a_sum_is_the_norm_of_the_rounded_sum(
    dtype: torch.dtype, twice: bool, rows: int, width: int
) -> None:
    torch.manual_seed(width)
    norm = RMSNorm(torch.randn(width), 1e-5, dtype=dtype, twice=twice)
    x, y = torch.randn(2, rows, width).to(dtype)
    sums, normed = norm.after_sum(x, y)
    assert torch.equal(sums, x + y)
    assert torch.equal(normed, norm(x + y))


def turned(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn heads [tokens, heads, dims] by angles [tokens, turned dims], as transformers does."""
    count = cosines.shape[-1]
    x, rest = heads[..., :count], heads[..., count:]
    rotated = torch.cat([-x[..., count // 2 :], x[..., : count // 2]], dim=-1)
    return torch.cat([x * cosines[:, None] + rotated * sines[:, None], rest], dim=-1)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("in_one", [False, True])
@pytest.mark.parametrize("slots", [None, slice(5, 8), torch.tensor([7, 0, 3])], ids=str)
@pytest.mark.parametrize(("style", "with_norms"), [(HALVES, True), (HALVES, False), (None, True)])
def test_heads_are_turned_and_put_where_they_are_kept(
    style: str | None,
    with_norms: bool,
    slots: slice | Tensor | None,
    in_one: bool,
    dtype: torch.dtype,
) -> None:
    """Four query heads over two of keys, of 24 dims, of which 16 are turned."""
    torch.manual_seed(3)
    heads, kv_heads, dims, tokens = 4, 2, 24, 3
    widths = [heads * dims, kv_heads * dims, kv_heads * dims]
    joined = [packed(16, each, dtype) for each in ([sum(widths)] if in_one else widths)]
    output = packed(heads * dims, 16, dtype)
    norms = [RMSNorm(torch.randn(dims), 1e-5, dtype=dtype) for _ in range(2)]
    form = AttentionForm(
        joined=joined,
        last=output,
        call=AttentionCall(0, 1.0),
        heads=(heads, kv_heads, dims),
        norms=(norms[0], norms[1]) if with_norms else None,
        style=style,
    )
    cosines, sines = torch.randn(2, tokens, 16).to(dtype)
    pool = torch.zeros(10, 2, kv_heads, dims, dtype=dtype)
    kept = Kept(None if slots is None else Place(pool, slots))
    with torch.inference_mode():
        x = torch.randn(1, tokens, 16).to(dtype)
        each = torch.cat([layer(x) for layer in joined], dim=-1)[0].view(tokens, -1, dims)
        query, key, value = each.split([heads, kv_heads, kv_heads], dim=1)
        if with_norms:
            query, key = norms[0](query), norms[1](key)
        if style is not None:
            query, key = (turned(rows, cosines, sines) for rows in (query, key))
        attention = FusedAttention(nn.Identity(), form)
        out, _ = attention(x, batch=kept, position_embeddings=(cosines[None], sines[None]))
        wanted = output(query.reshape(tokens, -1))
    assert torch.equal(kept.query, query) and torch.equal(kept.key, key)
    assert torch.equal(kept.value, value) and torch.equal(out[0], wanted)
    if slots is not None:
        assert torch.equal(pool[slots], torch.stack([key, value], dim=1))
        others = torch.ones(10, dtype=torch.bool)
        others[slots] = False
        assert not pool[others].any()


def kinds(model: LoadedModel) -> dict[type[nn.Module], int]:
    modules = list(model.transformer.modules())
    fused_types = (FusedGate, FusedAttention, FusedLayer)
    return {kind: sum(type(each) is kind for each in modules) for kind in fused_types}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_have_the_same_bits_as_those_of_transformers(
    architecture: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path, architecture)
    config = ModelConfig(device="cpu", dtype=dtype)
    fused = load_model(config, folder)
    monkeypatch.setattr(loader, "_layer_fusing", lambda *_: None)
    plain = load_model(config, folder)
    layers = len(plain.spec.layers)
    assert not any(kinds(plain).values())
    if architecture not in OTHERS:
        assert kinds(fused)[FusedAttention] == layers
    sequences = [some_tokens(length, seed) for seed, length in enumerate(LENGTHS)]
    for found, wanted in zip(
        packed_logits(fused, sequences), packed_logits(plain, sequences), strict=True
    ):
        assert torch.equal(found, wanted)
    for rows in (1, 5, FEW_ROWS):
        few = [some_tokens(rows, seed=rows)]
        assert torch.equal(packed_logits(fused, few)[0], packed_logits(plain, few)[0])
    short = sequences[:1]
    exact = packed_logits(exact_twin(fused), short)[0]
    assert torch.equal(exact, packed_logits(exact_twin(plain), short)[0])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3"])
def test_a_layer_is_recognized_by_what_it_computes(architecture: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, architecture)
    model = load_model(ModelConfig(device="cpu", dtype="float32"), folder)
    layers = len(model.spec.layers)
    assert kinds(model) == {FusedGate: layers, FusedAttention: layers, FusedLayer: layers}
    for each in model.transformer.modules():
        assert not isinstance(each, FusedLayer) or (each.few_rows and each.stack)


def test_a_layer_that_scales_what_it_adds_stays(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "granite", num_hidden_layers=1, residual_multiplier=0.7)
    model = load_model(ModelConfig(device="cpu", dtype="float32"), folder)
    assert kinds(model) == {FusedGate: 1, FusedAttention: 1, FusedLayer: 0}

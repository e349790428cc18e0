"""Parts of layers in few launches, for GPUs: interpreted on a CPU, they compute what models do."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from longctx.config import ModelConfig
from longctx.model import loader
from longctx.model.layer_attention import AttentionCall, Place
from longctx.model.loader import LoadedModel, load_model
from tests.support.kept_attention import Kept
from tests.support.plain_attention import eager_logits, packed_logits, some_tokens
from tests.support.tiny_models import ARCHITECTURES, write_model

pytest.importorskip("triton", reason="pip install triton, to test the kernels for GPUs")
with pytest.MonkeyPatch.context() as patch:  # Triton's decorators read it, when they are used
    patch.setenv("TRITON_INTERPRET", "1")
    from longctx.model.gpu_layers import (
        ACTIVATIONS,
        STYLES,
        TYPES,
        FusedAttention,
        FusedGate,
        FusedLayer,
        FusedNorm,
        fuse_gpu_layers,
    )
    from longctx.model.layer_fusing import AttentionForm
    from longctx.model.norm_fusing import fuse_norms

# numpy, which interprets, warns of NaN and infinity where a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

PLAIN = (F.silu, lambda x: F.gelu(x, approximate="tanh"), F.gelu)


@pytest.fixture(scope="module", autouse=True)
def _interpreted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are loaded as on a GPU."""
    monkeypatch.setattr(loader, "_kernels_for", lambda *_: None)
    monkeypatch.setattr(loader, "_layer_fusing", lambda *_: fuse_gpu_layers)


def kinds(model: LoadedModel) -> dict[type[nn.Module], int]:
    fused_types = (FusedNorm, FusedGate, FusedAttention, FusedLayer)
    modules = list(model.transformer.modules())
    return {kind: sum(type(each) is kind for each in modules) for kind in fused_types}


@pytest.mark.parametrize("width", [8, 100, 769])
def test_a_norm_of_a_sum_is_the_norm_of_the_rounded_sum(width: int) -> None:
    torch.manual_seed(width)
    norm = FusedNorm(torch.randn(width), 1e-5, dtype=torch.bfloat16)
    x, y = torch.randn(2, 3, width).bfloat16(), torch.randn(2, 3, width).bfloat16()
    sums, normed = norm.after_sum(x, y)
    assert torch.equal(sums, x + y)
    assert torch.equal(normed, norm(x + y))
    exact = sums.double() / (sums.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(normed.double(), exact * norm.factors, rtol=2**-7, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
def test_norms_of_models_are_replaced_in_every_type(
    kind: type[nn.Module], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    norm = kind(48, eps=1e-5).to(dtype)
    norm.get_parameter("weight").data.normal_()
    model = nn.Sequential(norm).eval()
    x = torch.randn(3, 48).to(dtype)
    with torch.inference_mode():
        wanted = model(x)
        assert fuse_norms(model, FusedNorm, types=TYPES) == 1
        assert isinstance(model[0], FusedNorm)
        torch.testing.assert_close(model(x), wanted, rtol=2**-6, atol=1e-6)
    assert fuse_norms(nn.Sequential(kind(48)).eval(), FusedNorm, types=(dtype,), most_width=40) == 0


@pytest.mark.parametrize("kind", range(3))
def test_gates_are_those_of_torch(kind: int) -> None:
    torch.manual_seed(kind)
    joined, output = nn.Linear(8, 2 * 1030), nn.Linear(1030, 8, bias=False)
    unit = FusedGate(joined, output, ACTIVATIONS[kind])
    x, rows = 5 * torch.randn(1, 2, 8), torch.randn(1, 2, 8)
    with torch.inference_mode():
        gates, passed = joined(x).chunk(2, dim=-1)
        wanted = output(PLAIN[kind](gates) * passed)
        torch.testing.assert_close(unit(x), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(unit.add_to(rows.clone(), x), rows + wanted)


def turned(x: Tensor, cosines: Tensor, sines: Tensor, style: int) -> Tensor:
    """Turn heads [tokens, heads, dims] plainly, by angles [tokens, turned dims]."""
    count = cosines.shape[-1]
    out = x.clone()
    for pair in range(count // 2):
        a, b = (pair, pair + count // 2) if style == 0 else (2 * pair, 2 * pair + 1)
        angle = 2 * pair if style == 2 else pair
        c, s = cosines[:, None, angle], sines[:, None, angle]
        out[..., a], out[..., b] = x[..., a] * c - x[..., b] * s, x[..., b] * c + x[..., a] * s
    return out


@pytest.mark.parametrize("slots", [None, slice(5, 8), torch.tensor([7, 0, 3])], ids=str)
@pytest.mark.parametrize(("style", "with_norms"), [(0, True), (1, False), (2, False), (None, True)])
def test_heads_are_turned_and_put_where_they_are_kept(
    style: int | None, with_norms: bool, slots: slice | Tensor | None
) -> None:
    """Four query heads over two of keys, of 24 dims, of which 16 are turned."""
    torch.manual_seed(3)
    heads, kv_heads, dims, tokens = 4, 2, 24, 3
    joined, output = nn.Linear(16, (heads + 2 * kv_heads) * dims), nn.Linear(heads * dims, 16)
    norms = (FusedNorm(torch.randn(dims), 1e-5), FusedNorm(torch.randn(dims), 1e-5))
    form = AttentionForm(
        joined=[joined],
        last=output,
        call=AttentionCall(0, 1.0),
        heads=(heads, kv_heads, dims),
        norms=norms if with_norms else None,
        style=None if style is None else STYLES[style],
    )
    attention = FusedAttention(joined, form)
    cosines, sines = torch.randn(2, tokens, 16)
    pool = torch.zeros(10, 2, kv_heads, dims)
    kept = Kept(None if slots is None else Place(pool, slots))
    with torch.inference_mode():
        x = torch.randn(1, tokens, 16)
        each = joined(x)[0].view(tokens, -1, dims)
        query, key, value = each.split([heads, kv_heads, kv_heads], dim=1)
        if with_norms:
            query, key = norms[0](query), norms[1](key)
        if style is not None:
            query, key = (turned(rows, cosines, sines, style) for rows in (query, key))
        out, _ = attention(x, batch=kept, position_embeddings=(cosines[None], sines[None]))
        wanted = output(query.reshape(tokens, -1))
    torch.testing.assert_close(kept.query, query)
    torch.testing.assert_close(kept.key, key)
    assert torch.equal(kept.value, value)
    torch.testing.assert_close(out[0], wanted)
    if slots is not None:
        torch.testing.assert_close(pool[slots], torch.stack([key, value], dim=1))
        others = torch.ones(10, dtype=torch.bool)
        others[slots] = False
        assert not pool[others].any()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3"])
def test_a_layer_is_recognized_by_what_it_computes(
    fused: None, tmp_path: Path, architecture: str
) -> None:
    folder = write_model(tmp_path, architecture, num_hidden_layers=1)
    model = load_model(ModelConfig(device="cpu", dtype="float32"), folder)
    assert kinds(model) == {FusedNorm: 3, FusedGate: 1, FusedAttention: 1, FusedLayer: 1}
    tokens = some_tokens(9, 0)
    found = packed_logits(model, [tokens, some_tokens(2, 1)])[0]
    torch.testing.assert_close(found, eager_logits(folder, tokens), atol=2e-4, rtol=1e-4)


def test_a_layer_that_scales_what_it_adds_stays(fused: None, tmp_path: Path) -> None:
    folder = write_model(tmp_path, "granite", num_hidden_layers=1, residual_multiplier=0.7)
    model = load_model(ModelConfig(device="cpu", dtype="float32"), folder)
    assert kinds(model) == {FusedNorm: 3, FusedGate: 1, FusedAttention: 1, FusedLayer: 0}
    tokens = some_tokens(9, 0)
    found = packed_logits(model, [tokens])[0]
    torch.testing.assert_close(found, eager_logits(folder, tokens), atol=2e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_computes_the_same(
    fused: None, tmp_path: Path, architecture: str
) -> None:
    folder = write_model(tmp_path, architecture)
    model = load_model(ModelConfig(device="cpu", dtype="float32"), folder)
    tokens = some_tokens(40, 0)
    found = packed_logits(model, [tokens, some_tokens(5, 1)])[0]
    torch.testing.assert_close(found, eager_logits(folder, tokens), atol=1e-3, rtol=1e-3)

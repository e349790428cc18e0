"""RMS norms in one pass are put in where, and only where, they compute the same."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

pytest.importorskip("longctx.kernels._kernels")

from longctx.model.rms_norm import RMSNorm, fuse_rms_norms


class Centred(LlamaRMSNorm):
    """Looks like an RMS norm and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


def test_a_norm_equals_the_plain_formula_for_any_width() -> None:
    torch.manual_seed(0)
    for width in (1, 7, 8, 64, 100, 769):
        weight, x = torch.randn(width), torch.randn(3, 5, width)
        wanted = x / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        torch.testing.assert_close(RMSNorm(weight, 1e-6)(x), wanted.float())
        strided = x.transpose(0, 1)
        torch.testing.assert_close(RMSNorm(weight, 1e-6)(strided), wanted.float().transpose(0, 1))


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm, nn.RMSNorm])
def test_norms_of_models_are_replaced_and_give_the_same(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    norm = kind(48, eps=1e-5)
    norm.get_parameter("weight").data.normal_()
    model = nn.Sequential(norm).eval()
    x = torch.randn(2, 9, 48)
    with torch.inference_mode():
        wanted = model(x)
        assert fuse_rms_norms(model) == 1
        assert isinstance(model[0], RMSNorm)
        torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("norm", [Centred(16), nn.LayerNorm(16), nn.Linear(16, 16), nn.Dropout()])
def test_what_computes_something_else_stays(norm: nn.Module) -> None:
    model = nn.Sequential(norm).eval()
    assert fuse_rms_norms(model) == 0
    assert model[0] is norm


def test_a_norm_in_another_type_stays() -> None:
    assert fuse_rms_norms(nn.Sequential(LlamaRMSNorm(16).half()).eval()) == 0


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm, nn.RMSNorm])
@pytest.mark.parametrize("width", [16, 100, 769])
def test_norms_in_bfloat16_round_where_the_models_do(kind: type[nn.Module], width: int) -> None:
    torch.manual_seed(0)
    norm = kind(width, eps=1e-5).bfloat16()
    norm.get_parameter("weight").data.normal_()
    model = nn.Sequential(norm).eval()
    x = torch.randn(40, 9, width).bfloat16()
    with torch.inference_mode():
        wanted = model(x)
        assert fuse_rms_norms(model) == 1
        assert isinstance(model[0], RMSNorm)
        found = model(x)
        assert found.dtype == torch.bfloat16
        assert (found == wanted).float().mean() > 0.999
        # A last bit may turn where each of two roundings is
        torch.testing.assert_close(found, wanted, rtol=2**-6, atol=0.0)
        # Each row by itself, and what is float32 in float32
        assert torch.equal(model(x[3:5]), found[3:5])
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
        weight = norm.get_parameter("weight").double()
        exact = exact * (1 + weight if kind is Gemma2RMSNorm else weight)
        torch.testing.assert_close(model(x.float()), exact.float())


def test_a_row_without_a_number_stays_without() -> None:
    x = torch.ones(2, 24).bfloat16()
    x[1, 3] = float("nan")
    found = RMSNorm(torch.ones(24), 1e-6, dtype=torch.bfloat16)(x)
    assert found[1].isnan().all() and not found[0].isnan().any()

"""Rounded weights are measured against exact ones, judged as codecs are, and acted upon."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longctx.attention.torch_backend import TorchAttention
from longctx.config import ModelConfig
from longctx.embedded import model_path
from longctx.engine_info import Verdict
from longctx.errors import ModelRefused
from longctx.model.loader import load_model
from longctx.quality import weights_gate
from longctx.quality.weights_gate import check_weights
from longctx.text.tokenizer import Tokenizer
from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer

pytest.importorskip("longctx.model.packed_linear", exc_type=ImportError)


def verdict(
    folder: Path, cache_dir: Path | None = None, dtype: str = "float32", **settings: object
) -> Verdict | None:
    config = ModelConfig(dtype=dtype, **settings)  # type: ignore[arg-type]
    model = load_model(config, folder)
    return check_weights(
        config, folder, model, Tokenizer(folder), TorchAttention, cache_dir=cache_dir
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_cost_little_pass_and_are_remembered(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = verdict(model_path("probe"), tmp_path, dtype, weights="int8")
    assert first is not None and first.passed
    assert first.measured.text is not None
    if dtype == "float32":  # what bfloat16 costs by itself is not counted
        assert first.measured.text.kl > 1e-6

    def measure_again(*_: object, **__: object) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr(weights_gate, "measure_variants", measure_again)
    assert verdict(model_path("probe"), tmp_path, dtype, weights="int8") == first


def test_weights_that_cost_too_much_are_refused_with_the_figures(tmp_path: Path) -> None:
    """One large weight takes the digits of all others of its output."""
    write_tokenizer(write_model(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            tensor[:, 0] = torch.sign(tensor[:, 0]) * 20
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelRefused, match=r"--weights int8 .* KL .* \+- .* --force-weights"):
        verdict(tmp_path, weights="int8")
    assert verdict(tmp_path, weights="int8", force_weights=True) is None
    assert verdict(tmp_path) is None


def test_forcing_needs_weights() -> None:
    with pytest.raises(ValueError, match="force_weights needs weights"):
        ModelConfig(force_weights=True)

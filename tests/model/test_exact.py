"""The float32 pass of a model in 16 bits: as exact as the model loaded in float32."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from longctx.attention.torch_backend import TorchAttention
from longctx.config import ModelConfig
from longctx.model.exact import exact_twin
from longctx.model.loader import LoadedModel, load_model
from longctx.quality.replay import Replay
from longctx.text.tokenizer import Tokenizer
from tests.conftest import ModelFolders
from tests.support.recorded_engine import some_ids

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def rows(model: LoadedModel, folder: Path) -> Tensor:
    """The logits of a prompt, computed in two chunks through the cache."""
    cache = Replay(
        model,
        Tokenizer(folder),
        TorchAttention,
        codec="raw",
        blocks=4,
        sequences=1,
        chunk_tokens=128,
    )
    sequence = cache.admit(some_ids(150, 5))
    first = cache.feed([(sequence, 128)], [128])
    return torch.cat([*first, *cache.feed([(sequence, 22)], [22])])


@pytest.mark.parametrize("dtype", sorted(TYPES))
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text", "gpt2", "mixtral"])
def test_the_twin_computes_what_the_model_would_in_float32(
    architecture: str, dtype: str, model_folders: ModelFolders, tmp_path: Path
) -> None:
    folder = model_folders(architecture)
    AutoModelForCausalLM.from_pretrained(folder, dtype=TYPES[dtype]).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    narrow = load_model(ModelConfig(dtype=dtype), tmp_path)  # type: ignore[arg-type]
    wide = rows(load_model(ModelConfig(dtype="float32"), tmp_path), tmp_path)
    twin = exact_twin(narrow)
    assert twin.spec.dtype == torch.float32 and narrow.spec.dtype == TYPES[dtype]
    torch.testing.assert_close(rows(twin, tmp_path), wide, atol=1e-3, rtol=1e-4)
    # The model itself is not that exact, and still computes as it did
    assert (rows(narrow, tmp_path) - wide).abs().max() > 5e-3


def test_a_model_in_float32_is_its_own_twin(llama: Path) -> None:
    model = load_model(ModelConfig(dtype="float32"), llama)
    assert exact_twin(model) is model

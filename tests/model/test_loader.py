"""The model seam: packed rows through our attention equal eager transformers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longctx.errors import ModelRefused
from tests.support.plain_attention import (
    PlainAttention,
    assert_equal_to_eager,
    edit_config,
    load,
    packed_logits,
    some_tokens,
)
from tests.support.tiny_models import ARCHITECTURES, VOCAB_SIZE, write_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_sequences_equal_eager_transformers(architecture: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, architecture)
    assert_equal_to_eager(folder, load(folder))


def test_each_layer_calls_once_and_in_order(tmp_path: Path) -> None:
    model = load(write_model(tmp_path, "gemma2"))
    attention = PlainAttention(model.spec.layers, [5])
    model.forward(some_tokens(5, 0), torch.arange(5), attention, torch.tensor([4]))
    assert attention.calls == [0, 1, 2, 3]


def test_logits_come_for_the_wanted_rows_only_and_may_be_none(tmp_path: Path) -> None:
    model = load(write_model(tmp_path))
    tokens, positions = some_tokens(6, 0), torch.arange(6)

    def logits(rows: list[int]) -> Tensor:
        attention = PlainAttention(model.spec.layers, [6])
        return model.forward(tokens, positions, attention, torch.tensor(rows, dtype=torch.int64))

    assert logits([]).shape == (0, VOCAB_SIZE)
    assert torch.allclose(logits([4, 1]), logits(list(range(6)))[[4, 1]], atol=1e-5)
    assert logits([0]).dtype == torch.float32


def test_two_models_live_in_one_process(tmp_path: Path) -> None:
    folders = [write_model(tmp_path / "a"), write_model(tmp_path / "b", "gpt_oss", seed=1)]
    models = [load(folder) for folder in folders]
    for folder, model in zip(folders, models, strict=True):
        assert_equal_to_eager(folder, model)


def test_loading_twice_gives_the_same_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    tokens = [some_tokens(9, 0)]
    first, second = load(folder), load(folder)
    assert first.spec == second.spec
    assert torch.equal(packed_logits(first, tokens)[0], packed_logits(second, tokens)[0])


@pytest.mark.parametrize(
    ("stored", "wanted", "instructions", "computed"),
    [
        (torch.bfloat16, "auto", True, torch.bfloat16),
        (torch.bfloat16, "auto", False, torch.float32),
        (torch.float32, "auto", True, torch.float32),
        (torch.bfloat16, "float32", True, torch.float32),
        (torch.float32, "bfloat16", False, torch.bfloat16),
    ],
)
def test_the_dtype_is_the_checkpoints_unless_told_or_emulated(
    stored: torch.dtype,
    wanted: str,
    instructions: bool,
    computed: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    folder = write_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t.to(stored) for name, t in tensors.items()}, folder / "model.safetensors")
    edit_config(folder, dtype=str(stored).removeprefix("torch."))
    spec = load(folder, dtype=wanted).spec
    assert spec.dtype == computed
    values = sum(tensor.numel() for tensor in tensors.values())
    narrowest = min(stored.itemsize, computed.itemsize)  # linear layers may stay as stored
    assert values * narrowest <= spec.weight_bytes <= values * computed.itemsize


def test_a_folder_that_names_no_dtype_keeps_that_of_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    folder = write_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(halves, folder / "model.safetensors")
    edit_config(folder, dtype=None)
    assert load(folder).spec.dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device: str, tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=device):
        load(write_model(tmp_path), device=device)

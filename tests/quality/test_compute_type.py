"""The compute type of a bfloat16 checkpoint on a CPU is the faster one, timed once, and kept."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longctx.config import CacheConfig, Dtype, EngineConfig, ModelConfig
from longctx.model import loader
from longctx.model.loader import LoadedModel, load_model
from longctx.open_engine import engine_parts
from longctx.quality import compute_type
from longctx.quality.compute_type import Pace, choose_dtype, time_by_turns
from longctx.text.tokenizer import Tokenizer
from offload.disk.folder import COMPUTE_TYPES
from tests.support.plain_attention import edit_config
from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer


def checkpoint(folder: Path, stored: torch.dtype = torch.bfloat16) -> Path:
    folder.mkdir()
    write_tokenizer(write_model(folder))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t.to(stored) for name, t in tensors.items()}, folder / "model.safetensors")
    edit_config(folder, dtype=str(stored).removeprefix("torch."))
    return folder


@pytest.fixture(autouse=True)
def bfloat16_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    _have_instructions(monkeypatch, True)


def _have_instructions(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    for module in (loader, compute_type):
        monkeypatch.setattr(module, "computes_bfloat16", lambda: there)


def _timed_as(monkeypatch: pytest.MonkeyPatch, **paces: Pace) -> list[str]:
    """Let types take these times; returns the list of what was timed."""
    timed: list[str] = []

    def time_by_turns(models: dict[Dtype, LoadedModel], *_: object) -> dict[Dtype, Pace]:
        for dtype, model in models.items():
            assert model.spec.dtype == getattr(torch, dtype)
            timed.append(dtype)
        return {dtype: paces[dtype] for dtype in models}

    monkeypatch.setattr(compute_type, "time_by_turns", time_by_turns)
    return timed


@pytest.mark.parametrize(
    ("bfloat16", "float32", "faster"),
    [
        (Pace(0.001, 0.020), Pace(0.002, 0.019), "bfloat16"),
        (Pace(0.001, 0.020), Pace(0.002, 0.009), "float32"),
        (Pace(0.002, 0.020), Pace(0.002, 0.020), "bfloat16"),
    ],
)
def test_the_faster_type_serves_and_is_timed_once(
    bfloat16: Pace,
    float32: Pace,
    faster: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed = _timed_as(monkeypatch, bfloat16=bfloat16, float32=float32)
    folder, said = checkpoint(tmp_path / "model"), list[str]()
    config = EngineConfig(model=ModelConfig(device="cpu"))
    first = choose_dtype(config, folder, cache_dir=tmp_path / "cache", say=said.append)
    assert first.dtype == faster
    assert first.reason is not None and f"{1000 * float32.answer_token:.3g}" in first.reason
    assert sorted(timed) == ["bfloat16", "float32"]
    assert [step.split()[1] for step in said] == timed
    if first.model is not None:
        assert first.model.spec.dtype == getattr(torch, faster)

    again = choose_dtype(config, folder, cache_dir=tmp_path / "cache")
    assert (again.dtype, again.reason, again.model) == (faster, first.reason, None)
    assert len(timed) == 2


@pytest.mark.parametrize(
    ("stored", "asked"),
    [(torch.float32, "auto"), (torch.float16, "auto"), (torch.bfloat16, "float32")],
)
def test_nothing_is_timed_where_nothing_is_to_choose(
    stored: torch.dtype, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU computes float16 as no kernel of ours does, so it gets float32."""
    timed = _timed_as(monkeypatch)
    model = ModelConfig(device="cpu", dtype=asked)  # type: ignore[arg-type]
    folder = checkpoint(tmp_path / "model", stored)
    choice = choose_dtype(EngineConfig(model=model), folder, cache_dir=tmp_path)
    assert (choice.dtype, choice.reason, timed) == ("float32", None, [])


def test_the_choice_stays_with_the_stored_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a store that moves to another machine, or loses the user's cache, would be of no use."""
    folder = checkpoint(tmp_path / "model")
    config = EngineConfig(
        model=ModelConfig(device="cpu"), cache=CacheConfig(kv_dir=tmp_path / "kv")
    )
    slow = Pace(1.0, 1.0)
    _timed_as(monkeypatch, bfloat16=Pace(0.1, 0.1), float32=slow)
    assert choose_dtype(config, folder, cache_dir=tmp_path / "one").dtype == "bfloat16"
    timed = _timed_as(monkeypatch, bfloat16=slow, float32=Pace(0.1, 0.1))
    assert choose_dtype(config, folder, cache_dir=tmp_path / "two").dtype == "bfloat16"
    _have_instructions(monkeypatch, False)
    assert choose_dtype(config, folder, cache_dir=tmp_path / "three").dtype == "bfloat16"
    assert not timed

    for file in (tmp_path / "kv" / COMPUTE_TYPES).iterdir():
        file.write_bytes(b"{")  # torn: chosen anew
    other = choose_dtype(config, folder, cache_dir=tmp_path / "four")
    assert other.dtype == "float32" and not timed
    assert other.reason is not None and "no instructions" in other.reason
    _have_instructions(monkeypatch, True)
    assert choose_dtype(config, folder, cache_dir=tmp_path / "five").dtype == "float32"


@pytest.mark.parametrize("narrow_fits", [False, True])
def test_a_model_that_fits_once_is_timed_in_one_type_after_the_other(
    narrow_fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 has wider embeddings, so two of the narrow one may fit where two of it do not."""
    folder = checkpoint(tmp_path / "model")
    wide = load_model(ModelConfig(device="cpu", dtype="float32"), folder).spec.weight_bytes
    memory = 4 * wide - 1 if narrow_fits else 1000
    monkeypatch.setattr(compute_type, "memory_bytes", lambda: memory)
    timed = _timed_as(monkeypatch, bfloat16=Pace(0.1, 0.1), float32=Pace(1.0, 1.0))
    config = EngineConfig(model=ModelConfig(device="cpu"))
    choice = choose_dtype(config, folder, cache_dir=None)
    assert (choice.dtype, timed) == ("bfloat16", ["float32", "bfloat16"])
    assert choice.model is not None and choice.model.spec.dtype == torch.bfloat16


def test_other_weights_are_timed_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = _timed_as(monkeypatch, bfloat16=Pace(0.1, 0.1), float32=Pace(1.0, 1.0))
    folder = checkpoint(tmp_path / "model")
    config = EngineConfig(model=ModelConfig(device="cpu"))
    choose_dtype(config, folder, cache_dir=tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: -tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    choose_dtype(config, folder, cache_dir=tmp_path)
    assert len(timed) == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_context", [None, 40])
def test_a_model_is_timed_through_its_cache(
    dtype: Dtype, max_context: int | None, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "model")
    config = ModelConfig(device="cpu", dtype=dtype, max_context=max_context)
    model = load_model(config, folder)
    pace = time_by_turns({dtype: model}, Tokenizer(folder), "auto")[dtype]
    assert 0 < pace.prompt_token < pace.answer_token < 10


def test_an_engine_says_in_which_type_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _timed_as(monkeypatch, bfloat16=Pace(1.0, 1.0), float32=Pace(0.1, 0.1))
    folder = checkpoint(tmp_path / "model")
    config = EngineConfig(
        model=ModelConfig(device="cpu"),
        cache=CacheConfig(kv_codec="raw", device_pool_gib=0.01),
    )
    info = engine_parts(config, folder, cache_dir=tmp_path / "cache").info
    assert info.dtype == "float32"
    assert info.dtype_reason is not None and info.dtype_reason.startswith("float32, the faster")
    told = replace(config, model=replace(config.model, dtype="bfloat16"))
    assert engine_parts(told, folder, cache_dir=tmp_path / "cache").info.dtype_reason is None

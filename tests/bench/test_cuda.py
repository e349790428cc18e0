"""`bench cuda`, as far as a machine without a GPU can tell: what it measures, on a small model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from compress.codec import CODECS
from longctx.bench import cuda, kernels, machine_rates, random_model
from longctx.bench.config import BenchConfig, CUDAConfig, RoundsConfig
from longctx.bench.random_model import Size, write_large_llama
from longctx.bench.report import publish
from longctx.cli import main
from longctx.config import CacheConfig, EngineConfig, ModelConfig
from longctx.model.loader import load_model
from tests.bench.test_speed import results

SMALL = Size(
    hidden=64, layers=2, heads=4, kv_heads=2, mlp=96, vocabulary=300, max_tokens=4096, large=True
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(random_model.SIZES, cuda.MODEL, SMALL)
    monkeypatch.setattr(cuda, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(cuda, "SHORT_TOKENS", 64)
    monkeypatch.setattr(machine_rates, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(machine_rates, "GEMM_DIM", 64)
    monkeypatch.setattr(kernels, "last_level_cache_bytes", lambda _: 1 << 18)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
@pytest.mark.parametrize("options", [(), ("--device", "cpu")])
def test_without_a_gpu_it_is_refused_with_what_to_do(options: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match=r"bench cuda measures a GPU.*use bench kernels"):
        main(["bench", "cuda", *options])


@pytest.mark.usefixtures("small")
def test_each_figure_stands_beside_its_bound(capsys: pytest.CaptureFixture[str]) -> None:
    engine = EngineConfig(
        model=ModelConfig(device="cpu", threads=1, attention_backend="torch", dtype="bfloat16"),
        cache=CacheConfig(device_pool_gib=0.05),
    )
    report = cuda.measure(
        torch.device("cpu"),
        engine,
        BenchConfig(),
        RoundsConfig(rounds=1),
        CUDAConfig(depth=512, batches="1,3"),
        say=lambda _: None,
    )
    publish(report, bench="cuda", command="longctx bench cuda", out=None)
    found = results(capsys)
    assert {row["way"] for row in found["copy"]} == {
        "on the device",
        "pinned to device",
        "device to pinned",
        "pageable to device",
    }
    decoded = {(row["codec"], row["sequences"]) for row in found["attention decode"]}
    assert {(codec, count) for codec in CODECS for count in (1, 3)} <= decoded
    assert all(row["share_of_memory_read"] > 0 for row in found["attention decode"])
    steps = [(row["kv_codec"], row["context_tokens"]) for row in found["step"]]
    assert steps == [(codec, context) for codec in CODECS for context in (64, 512)]
    on_device = next(row["value"] for row in found["copy"] if row["way"] == "on the device")
    weights = 2 * (SMALL.layers * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 128) + 302 * 64)
    raw = next(row for row in found["step"] if row["context_tokens"] == 512)
    read = weights + 512 * SMALL.layers * 2 * 2 * 16 * 2
    assert raw["floor_ms"] == pytest.approx(1000 * read / (1e9 * on_device), rel=1e-3)
    assert raw["times_floor"] == pytest.approx(raw["value"] / raw["floor_ms"], rel=1e-3)
    assert all(row["value"] > 0 for row in (*found["chunk"], *found["restore"]))


def test_a_large_model_is_an_ordinary_folder_of_bfloat16(tmp_path: Path) -> None:
    write_large_llama(tmp_path, SMALL, seed=0)
    loaded = load_model(ModelConfig(device="cpu", dtype="bfloat16", threads=1), tmp_path)
    assert (loaded.spec.dtype, len(loaded.spec.layers)) == (torch.bfloat16, SMALL.layers)
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    total = 0
    for name, file in places.items():
        with safe_open(tmp_path / file, "pt") as weights:
            total += weights.get_tensor(name).numel()
    assert total - SMALL.vocabulary * SMALL.hidden == SMALL.weights_read - SMALL.hidden

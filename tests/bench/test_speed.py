"""The benchmarks of speed measure what they say, on models too small to be interesting."""

import json
from pathlib import Path

import pytest
import torch

from compress.codec import CODECS
from longctx.attention.reference import ReferenceAttention
from longctx.attention.registry import BACKENDS
from longctx.attention.torch_backend import TorchAttention
from longctx.bench import kernels, machine_rates
from longctx.bench.decode import summed
from longctx.bench.document import count_calls
from longctx.bench.measured_engine import MeasuredEngine
from longctx.bench.random_pages import random_chunk
from longctx.bench.timing import Stopwatch
from longctx.cli import main
from longctx.config import CacheConfig, EngineConfig, ModelConfig
from longctx.kv.memory import KVMemory
from longctx.model.layer_attention import AttentionCall
from longctx.model.spec import LayerSpec
from longctx.request import SamplingParams, Segment


def results(capsys: pytest.CaptureFixture[str]) -> dict[str, list[dict[str, float]]]:
    by_metric: dict[str, list[dict[str, float]]] = {}
    record = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])
    for row in record["results"]:
        by_metric.setdefault(row["metric"], []).append(row)
    return by_metric


def test_decode_is_measured_against_transformers_and_says_the_same(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--against transformers --contexts 20,300 --new-tokens 4 --rounds 2 --dtype float32"
    main(["bench", "decode", "--model", str(model), "--out", str(tmp_path), *options.split()])
    found = results(capsys)
    assert [row["context_tokens"] for row in found["decode"]] == [20, 300]
    for row in (*found["decode"], *found["prefill"]):
        assert row["ratio"] == pytest.approx(row["baseline_value"] / row["value"], rel=1e-3)
        assert row["baseline"] == "transformers.generate" and row["rounds"] == 2
    assert [row["value"] for row in found["same tokens"]] == [1.0, 1.0]
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_decode_is_measured_at_each_depth_for_each_codec(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--contexts 100,600,2000 --new-tokens 3 --rounds 1 --threads 1 --device-pool-gib 0.1"
    main(["bench", "decode", "--model", str(model), "--out", str(tmp_path), *options.split()])
    found = results(capsys)
    codecs = [codec for codec in CODECS for _ in range(3)]
    for metric in ("prefill", "decode"):
        rows = found[metric]
        assert [row["kv_codec"] for row in rows] == codecs
        assert [row["context_tokens"] for row in rows] == [100, 600, 2000] * len(CODECS)
        for row in rows:
            shares = [row[f"{part}_share"] for part in ("attention", "linears", "sampling", "rest")]
            assert row["value"] > 0 and row["unit"] == "tokens/s"
            assert sum(shares) == pytest.approx(1.0, abs=1e-3)
            assert row["attention_share"] > 0 and row["linears_share"] > 0
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_a_planted_context_is_found_and_read(model: Path) -> None:
    config = EngineConfig(
        model=ModelConfig(model=model, threads=1),
        cache=CacheConfig(kv_codec="int8", force_codec=True, device_pool_gib=0.1),
    )
    engine = MeasuredEngine(config, model)
    prompt = tuple(range(5, 5 + 200))
    engine.plant(prompt)
    answers = []
    for last in (prompt[-1], 7):
        segments = (Segment(token_ids=(*prompt[:-1], last)),)
        answers.append(Stopwatch(engine).ask(segments, SamplingParams(max_tokens=2)))
    assert [answer.usage.cached_tokens for answer in answers] == [192, 192]


def test_prefill_of_a_prompt_is_the_sum_of_its_chunks() -> None:
    seconds = {(0, 512): 1.0, (1536, 512): 4.0, (0, 100): 0.25}
    assert summed(100, 512, seconds) == 0.25
    assert summed(2048, 512, seconds) == pytest.approx(1 + 2 + 3 + 4)
    assert summed(1280, 512, seconds) == pytest.approx(1 + 2 + 3 / 2)


def test_kernels_are_held_against_the_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_rates, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(machine_rates, "GEMM_DIM", 64)
    monkeypatch.setattr(kernels, "last_level_cache_bytes", lambda _: 1 << 20)
    options = "--head-dims 16 --groups 2 --kv-heads 2 --context 256 --prefill-rows 64 --rounds 1"
    main(["bench", "kernels", "--out", str(tmp_path), "--threads", "1", *options.split()])
    found = results(capsys)
    contenders = {(backend, codec) for backend in BACKENDS for codec in CODECS}
    contenders = {each for each in contenders if each[0] != "reference"} | {("sdpa", "dense")}
    for metric, share in (
        ("decode", "share_of_memory_read"),
        ("prefill", "share_of_matrix_product"),
    ):
        rows = found[metric]
        assert {(row["backend"], row["codec"]) for row in rows} == contenders
        assert all(row["value"] > 0 and row[share] > 0 and row["ratio"] > 0 for row in rows)
    assert len(found["memory read"]) == 1 and len(found["matrix product"]) == 2
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_random_pages_are_read_as_any_others() -> None:
    spec = LayerSpec(heads=4, kv_heads=2, head_dim=16, window=None)
    for codec in CODECS:
        memory = KVMemory(
            [spec, spec],
            dtype=torch.float32,
            device=torch.device("cpu"),
            codec=codec,
            pool_bytes=1 << 21,
            step_blocks=4,
        )
        chunk = random_chunk(memory, past_blocks=3, rows=100)
        query = torch.randn(100, 4, 16)
        outs = []
        for attention in (ReferenceAttention(memory), TorchAttention(memory)):
            plan = attention.plan([chunk], 0)
            outs.append(attention.attend(AttentionCall(1, 0.25), query, plan)[0])
        torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)
        assert outs[0].std() > 0.05


def test_a_warm_question_computes_no_document(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--document-lengths 512,1024 --rounds 2 --threads 1"
    main(["bench", "document", "--model", str(model), "--out", str(tmp_path), *options.split()])
    found = results(capsys)
    assert len(found["warm first token"]) == len(found["cold first token"]) == 2
    for row in found["computed tokens of a warm question"]:
        assert row["value"] <= 128
    assert (tmp_path / "document.png").read_bytes().startswith(b"\x89PNG")


def test_calls_are_counted_once_each() -> None:
    numbers: list[int] = []

    def work() -> None:
        for number in range(5):
            numbers.append(number)

    few = count_calls(work)
    assert len(numbers) == 5
    assert few - count_calls(lambda: None) == 5

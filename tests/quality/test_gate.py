"""What a codec costs is measured through the real cache, judged by fixed limits, and acted upon."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.codec import CODECS
from compress.shape import BLOCK_TOKENS
from longctx.attention.backend import BackendFactory
from longctx.attention.torch_backend import TorchAttention
from longctx.config import CacheConfig, ModelConfig
from longctx.embedded import model_path
from longctx.engine_info import CodecChoice, Damage, Measured, Verdict
from longctx.errors import ModelRefused
from longctx.kv.memory import KVMemory
from longctx.model.exact import _Exact
from longctx.model.loader import LoadedModel, load_model
from longctx.quality.damage import COLUMNS, FLIPS, DamageMeter, compare
from longctx.quality.gate import choose_codec, judge_codec
from longctx.quality.measure import Workload, measure
from longctx.quality.replay import Replay
from longctx.quality.texts import TEXTS
from longctx.quality.verdict import LOSSLESS, is_settled, judge
from longctx.text.tokenizer import Tokenizer
from tests.conftest import ModelFolders
from tests.support.biased_models import write_biased_probe
from tests.support.recorded_engine import Eager, some_ids
from tests.support.rounded_codecs import ROUNDED
from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer

SHORT = Workload(text_tokens=(128, 160), own_tokens=16, more_answers=0, limit_seconds=None)


def loaded(
    folder: Path, *, dtype: str = "float32", **settings: object
) -> tuple[LoadedModel, Tokenizer]:
    """A model that computes in float32 unless told: then a lossless codec changes nothing."""
    config = ModelConfig(dtype=dtype, **settings)  # type: ignore[arg-type]
    return load_model(config, folder), Tokenizer(folder)


@pytest.fixture
def rounded_codecs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, codec in ROUNDED.items():
        monkeypatch.setitem(CODECS, name, codec)


@pytest.fixture(scope="module")
def probe() -> tuple[LoadedModel, Tokenizer]:
    return loaded(model_path("probe"))


# -- the measurement ------------------------------------------------------------------------------


def replayed(
    model: LoadedModel, tokenizer: Tokenizer, codec: str, counts: Sequence[int]
) -> tuple[list[int], Tensor]:
    """Tokens and the logits of all rows, computed `counts` at a time."""
    cache = Replay(
        model, tokenizer, TorchAttention, codec=codec, blocks=8, sequences=1, chunk_tokens=192
    )
    tokens = list(some_ids(sum(counts), 3))
    prompt = tokens[: -counts.count(1) or None]
    sequence = cache.admit(prompt)
    rows = []
    for count in counts:
        if sequence.blocks.remaining == 0:
            sequence.blocks.tokens.append(tokens[sequence.blocks.computed])
        rows += cache.feed([(sequence, count)], [count])
    return tokens, torch.cat(rows)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_raw_rows_are_those_of_transformers(architecture: str, model_folders: ModelFolders) -> None:
    folder = model_folders(architecture)
    tokens, rows = replayed(*loaded(folder), "raw", [192, 40, 1, 1, 1])
    torch.testing.assert_close(rows, Eager(folder).rows(tokens), atol=1e-4, rtol=1e-4)


def test_chunks_and_single_tokens_show_the_same_damage(llama: Path) -> None:
    together = replayed(*loaded(llama), "int8", [190, 2, 64, 1, 1])[1]
    apart = replayed(*loaded(llama), "int8", [64, 128, 30, 34, 1, 1])[1]
    exact = replayed(*loaded(llama), "raw", [190, 2, 64, 1, 1])[1]
    assert (together - apart).abs().median() < (together - exact).abs().median() / 100


def test_the_figures_are_those_of_their_definitions() -> None:
    exact, coded = torch.randn(40, 9), torch.randn(40, 9)
    targets = torch.randint(9, (40,))
    meter = DamageMeter()
    meter.add(compare(exact, coded, targets))
    damage = meter.damage()
    assert damage is not None and damage.rows == 40
    p, q = exact.double().softmax(-1), coded.double().softmax(-1)
    assert damage.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert damage.flips == pytest.approx(float((p.argmax(-1) != q.argmax(-1)).double().mean()))
    nats = -p.gather(-1, targets[:, None]).log().mean()
    more = -q.gather(-1, targets[:, None]).log().mean() - nats
    assert damage.raw_perplexity == pytest.approx(float(nats.exp()), rel=1e-5)
    assert damage.perplexity_rise == pytest.approx(float(more.exp()) - 1, rel=1e-4)


def test_the_interval_knows_that_neighbors_are_alike() -> None:
    torch.manual_seed(0)
    levels = torch.rand(400, 1).expand(400, 16).reshape(-1, 1)
    alike, independent = DamageMeter(), DamageMeter()
    alike.add(levels.expand(-1, COLUMNS))
    independent.add(torch.rand(6400, 1).expand(-1, COLUMNS))
    wide, narrow = alike.damage(), independent.damage()
    assert wide is not None and narrow is not None
    assert narrow.kl_error == pytest.approx(1.96 * 12**-0.5 / 80, rel=0.1)
    assert wide.kl_error == pytest.approx(4 * narrow.kl_error, rel=0.2)


@pytest.mark.usefixtures("rounded_codecs")
def test_a_codec_that_changes_nothing_costs_nothing(llama: Path) -> None:
    measured = measure(*loaded(llama), TorchAttention, ["same"], workload=SHORT)["same"]
    assert measured.text is not None and measured.own is not None
    # Only the order of sums differs: a lossless codec lets a chunk read its own blocks at once
    assert max(measured.text.kl, measured.own.kl) < 1e-6
    assert measured.own.rows == 2 * len(TEXTS) * SHORT.own_tokens
    read = SHORT.text_tokens[-1] - BLOCK_TOKENS
    assert len(TEXTS) * (read - 1) <= measured.text.rows <= len(TEXTS) * (read + 4)


@pytest.mark.usefixtures("rounded_codecs")
def test_codecs_rank_as_they_should_on_the_probe(probe: tuple[LoadedModel, Tokenizer]) -> None:
    workload = Workload(own_tokens=8, more_answers=0, limit_seconds=None)
    names = ("int8", "int4", "q4_0", "bad")
    measured = measure(*probe, TorchAttention, names, workload=workload)
    text = {name: measured[name].text for name in names}
    assert text["int8"].kl + text["int8"].kl_error < 1e-3
    assert text["int8"].kl < text["int4"].kl <= text["q4_0"].kl < text["bad"].kl
    spec = probe[0].spec
    assert judge_codec(spec, "int8", measured["int8"]).judged == ("text", "own")
    assert judge_codec(spec, "int8", measured["int8"]).passed
    assert judge_codec(spec, "int4", measured["int4"]).passed
    assert not judge_codec(spec, "bad", measured["bad"]).passed


def test_needle_is_judged_by_its_own_answers() -> None:
    model, tokenizer = loaded(model_path("needle"))
    measured = measure(model, tokenizer, TorchAttention, ["int8"], workload=Workload())["int8"]
    verdict = judge_codec(model.spec, "int8", measured)
    assert verdict.text_is_foreign and verdict.judged == ("own",)
    assert verdict.passed


@pytest.mark.parametrize("max_context", [96, 512])
def test_short_contexts_are_measured_as_far_as_they_go(max_context: int, llama: Path) -> None:
    model, tokenizer = loaded(llama, max_context=max_context)
    measured = measure(model, tokenizer, TorchAttention, ["int8"], workload=Workload())["int8"]
    assert measured.own is not None and measured.own.kl > 0


def test_time_that_is_up_leaves_enough_to_judge(llama: Path) -> None:
    hurried = replace(SHORT, own_tokens=48, limit_seconds=0.0)
    measured = measure(*loaded(llama), TorchAttention, ["int8"], workload=hurried)["int8"]
    assert measured.text is not None and measured.own is not None
    assert measured.text.rows < SHORT.text_tokens[0]
    assert measured.own.rows == 32


# -- damage and noise -----------------------------------------------------------------------------

TYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.usefixtures("rounded_codecs")
def test_the_verdict_does_not_depend_on_the_type_that_serves(dtype: str) -> None:
    """bfloat16 is noisier than int8 is lossy, and no reason to refuse int8, or a codec like raw."""
    model, tokenizer = loaded(model_path("probe"), dtype=dtype)
    names = ("same", "bf16", "int8", "int4", "bad")
    measured = measure(
        model,
        tokenizer,
        TorchAttention,
        names,
        workload=Workload(more_answers=0, limit_seconds=None),
    )
    passed = {name: judge_codec(model.spec, name, measured[name]).passed for name in names}
    assert passed == {"same": True, "bf16": True, "int8": True, "int4": True, "bad": False}
    noise = measured["same"].text
    assert noise is not None and (noise.raw_kl == 0) == (dtype == "float32")
    assert abs(noise.kl) <= 1e-6 + 2 * noise.kl_error  # float32 sums in another order


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {
        bias: write_biased_probe(tmp_path_factory.mktemp(f"bias{bias}"), bias)
        for bias in (0, 300, 900)
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [300, 900])
def test_keys_with_a_large_bias_are_served_with_int8(
    bias: int, dtype: str, biased: dict[int, Path]
) -> None:
    """Large biases in a few dims, turning or not, as all Qwen2 keys have."""
    found = choose_codec(
        CacheConfig(kv_codec="auto"), *loaded(biased[bias], dtype=dtype), Kernels, cache_dir=None
    )
    assert found.codec == "int8", found.reason


def test_a_large_bias_of_keys_costs_int4_no_more_than_twice(biased: dict[int, Path]) -> None:
    costs: dict[int, Measured] = {}
    for bias, folder in biased.items():
        costs[bias] = measure(
            *loaded(folder),
            TorchAttention,
            ["int4"],
            workload=Workload(more_answers=0, limit_seconds=None),
        )["int4"]
    plain_text, plain_own = costs[0].text, costs[0].own
    assert plain_text is not None and plain_own is not None
    for bias in (300, 900):
        text, own = costs[bias].text, costs[bias].own
        assert text is not None and own is not None
        assert text.nats == pytest.approx(plain_text.nats, rel=0.05)  # the model is as good
        assert text.kl <= 2 * plain_text.kl
        assert own.kl <= 2 * plain_own.kl


def test_what_is_no_more_than_noise_is_no_fault(llama: Path) -> None:
    """Changed tokens and perplexity beyond their limits count where chance did not make them."""
    spec = loaded(llama)[0].spec
    torch.manual_seed(0)
    for chance, passed in ((True, True), (False, False)):
        rows = torch.zeros(320, COLUMNS)
        rows[:, FLIPS] = (torch.rand(320) < 0.2).float() * 0.15
        if chance:  # as many rows come closer to the exact pass as leave it
            rows[:, FLIPS] = torch.randn(320).sign() + 0.03
        meter = DamageMeter()
        meter.add(rows)
        measured = Measured(text=None, own=meter.damage(), seconds=0.0)
        assert measured.own is not None and measured.own.flips > 0.02
        assert judge_codec(spec, "int8", measured).passed is passed


def test_one_exact_pass_serves_all_codecs(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = _Exact.forward

    def counted(self: _Exact, token_ids: Tensor, *rest: Any) -> Tensor:
        calls.append(len(token_ids))
        return forward(self, token_ids, *rest)

    monkeypatch.setattr(_Exact, "forward", counted)
    model, tokenizer = loaded(llama, dtype="bfloat16")
    measure(model, tokenizer, TorchAttention, ["int8"], workload=SHORT)
    alone = list(calls)
    calls.clear()
    measure(model, tokenizer, TorchAttention, ["bf16", "int8", "int4"], workload=SHORT)
    assert calls == alone and alone


# -- how much is measured -------------------------------------------------------------------------


def test_the_second_stage_reads_on_where_the_first_one_stopped(llama: Path) -> None:
    seen: list[Measured] = []
    told: list[tuple[int, int]] = []

    def content(found: Mapping[str, Measured]) -> bool:
        seen.append(found["int8"])
        return False

    def of(*stages: int) -> Measured:
        workload = replace(SHORT, text_tokens=stages, own_tokens=8)
        return measure(
            *loaded(llama),
            TorchAttention,
            ["int8"],
            workload=workload,
            content=content,
            on_text=lambda done, most: told.append((done, most)),
        )["int8"]

    staged, whole = of(128, 200), of(200)
    first, second, _ = seen
    assert first.text is not None and second.text is not None and whole.text is not None
    assert first.text.rows < second.text.rows == staged.text.rows == whole.text.rows
    assert staged.text.nats == pytest.approx(whole.text.nats, rel=1e-6)
    assert first.own is not None and second.own is not None
    assert len(TEXTS) * 8 >= first.own.rows < second.own.rows
    assert told[: 2 * len(TEXTS)] == [(n + 1, 2 * len(TEXTS)) for n in range(2 * len(TEXTS))]


def test_where_nothing_is_decided_every_question_is_asked_again(llama: Path) -> None:
    """Other answers to the same prompts: as text they are measured no further."""
    seen: list[Measured] = []

    def content(found: Mapping[str, Measured]) -> bool:
        seen.append(found["int8"])
        return len(seen) == 4

    workload = replace(SHORT, more_answers=3)
    measure(*loaded(llama), TorchAttention, ["int8"], workload=workload, content=content)
    assert len({each.text for each in seen[1:]}) == 1
    answers = [each.own.rows for each in seen if each.own is not None]
    asked = len(TEXTS) * SHORT.own_tokens
    assert answers == [asked, 2 * asked, 4 * asked, 6 * asked]
    assert len({each.own.kl for each in seen if each.own is not None}) == 4


@pytest.mark.usefixtures("rounded_codecs")
def test_an_interval_clear_of_the_limit_ends_the_measurement(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CODECS, "int4", CODECS["bad"])
    said: list[str] = []
    for codec, passes in (("int8", True), ("int4", False)):
        said.clear()
        try:
            choose_codec(
                CacheConfig(kv_codec=codec),
                *loaded(llama),
                Kernels,
                cache_dir=None,
                say=said.append,
            )
        except ModelRefused:
            assert not passes
        assert len(said) == len(TEXTS)
        assert said[0].startswith(f"measuring what KV codec {codec} costs ")
        assert said[-1].endswith(f"once for this model: {len(TEXTS)} of at most 8 texts")


def test_what_an_interval_does_not_settle_is_measured_on() -> None:
    def verdict(kl: float, error: float, rows: int = 128) -> Verdict:
        damage = Damage(
            rows=rows,
            kl=kl,
            kl_error=error,
            flips=0.0,
            flips_error=0.0,
            nats=1.0,
            more_nats=0.0,
            more_nats_error=0.0,
            raw_kl=0.0,
            raw_flips=0.0,
        )
        measured = Measured(text=damage, own=damage if rows > 64 else None, seconds=0.0)
        return judge("int8", measured, LOSSLESS, vocab_size=1000)

    assert is_settled(verdict(2e-4, 1e-4))
    assert is_settled(verdict(9e-3, 1e-3))
    assert verdict(5e-4, 4e-4).passed and not is_settled(verdict(5e-4, 4e-4))
    assert not verdict(1.2e-3, 4e-4).passed and not is_settled(verdict(1.2e-3, 4e-4))
    assert not is_settled(verdict(2e-4, 1e-4, rows=64))  # no answer was judged
    assert not is_settled(verdict(float("nan"), float("nan")))


# -- the choice -----------------------------------------------------------------------------------


class Kernels(TorchAttention):
    """Takes the part of a backend that reads packed pages as they are."""

    decodes_pages = False


def choice(
    folder: Path,
    codec: str,
    *,
    force: bool = False,
    backend: BackendFactory | None = None,
    cache_dir: Path | None = None,
) -> CodecChoice:
    return choose_codec(
        CacheConfig(kv_codec=codec, force_codec=force),
        *loaded(folder),
        backend or Kernels,
        cache_dir=cache_dir,
        workload=SHORT,
    )


def test_auto_takes_int8_where_it_passes(llama: Path) -> None:
    found = choice(llama, "auto")
    assert found.codec == "int8" and not found.forced
    assert found.reason.startswith("int8, which passed: KL in its own answers ")
    assert found.verdict is not None and found.verdict.passed


@pytest.mark.usefixtures("rounded_codecs")
def test_auto_stays_raw_where_int8_does_damage(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CODECS, "int8", CODECS["bad"])
    found = choice(llama, "auto")
    assert found.codec == "raw"
    assert found.reason.startswith("raw, since int8 did not pass: KL in its own answers is ")
    assert "the limit 0.001" in found.reason


def test_auto_stays_raw_for_heads_that_int8_cannot_hold(tmp_path: Path) -> None:
    write_tokenizer(write_model(tmp_path, head_dim=12))
    found = choice(tmp_path, "auto")
    assert found.codec == "raw" and "12" in found.reason
    with pytest.raises(ModelRefused, match="12"):
        choice(tmp_path, "int8", force=True)


def test_auto_stays_raw_where_the_backend_would_unpack_pages(llama: Path) -> None:
    found = choice(llama, "auto", backend=TorchAttention)
    assert found.codec == "raw" and "unpacked for every token" in found.reason


def test_auto_stays_raw_where_nothing_can_be_told(tmp_path: Path) -> None:
    write_tokenizer(write_model(tmp_path, max_position_embeddings=BLOCK_TOKENS))
    found = choice(tmp_path, "auto", cache_dir=tmp_path)
    assert found.reason.endswith("int8 did not pass: its context or answers are too short to tell")
    assert not (tmp_path / "quality").exists()


@pytest.mark.usefixtures("rounded_codecs")
def test_a_codec_that_was_asked_for_and_fails_is_refused_with_the_cure(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CODECS, "int4", CODECS["bad"])
    with pytest.raises(ModelRefused, match=r"KL .* is [0-9.e-]+ \+- .*the limit .*--force-codec"):
        choice(llama, "int4")


@pytest.mark.usefixtures("rounded_codecs")
def test_a_forced_codec_is_used_and_called_forced(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CODECS, "int4", CODECS["bad"])
    found = choice(llama, "int4", force=True)
    assert found.codec == "int4" and found.forced and "forced" in found.reason


def test_an_exact_codec_is_not_measured(llama: Path) -> None:
    found = choice(llama, "raw")
    assert (found.codec, found.verdict) == ("raw", None)


def test_a_verdict_is_remembered_until_something_changes(llama: Path, tmp_path: Path) -> None:
    made: list[KVMemory] = []

    class Counted(Kernels):
        def __init__(self, memory: KVMemory) -> None:
            super().__init__(memory)
            made.append(memory)

    class Other(Counted):
        pass

    def choices(backend: type[Counted] = Counted) -> CodecChoice:
        made.clear()
        return choice(llama, "auto", cache_dir=tmp_path, backend=backend)

    first = choices()
    assert made
    assert choices() == first and not made
    choices(Other)
    assert made
    for file in (tmp_path / "quality").iterdir():
        file.write_text("{", encoding="ascii")
    choices()
    assert made


def test_a_folder_that_cannot_be_written_costs_only_time(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "quality").write_text("in the way", encoding="ascii")
    assert choice(llama, "auto", cache_dir=tmp_path).codec == "int8"


def test_what_is_not_a_number_does_not_pass(llama: Path) -> None:
    rows = torch.full((64, COLUMNS), torch.nan)
    meter = DamageMeter()
    meter.add(rows)
    measured = Measured(text=meter.damage(), own=None, seconds=0.0)
    assert not judge_codec(loaded(llama)[0].spec, "int8", measured).passed


def test_forcing_needs_a_codec() -> None:
    with pytest.raises(ValueError, match="force_codec needs a codec"):
        CacheConfig(force_codec=True)

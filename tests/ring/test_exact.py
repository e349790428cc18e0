"""Many ranks compute what one rank computes, however the work is cut."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.codec import CODECS
from longctx.embedded import MODELS, model_path
from longctx.errors import InvalidRequest
from longctx.request import Piece, Request, Segment
from tests.conftest import ModelFolders
from tests.ring.side_by_side import SideBySide, ringed_engine
from tests.support.recorded_engine import Eager, ask, assert_equals_eager, gib_of_blocks, some_ids

# Beside windows of 24 tokens: an extent and more, within one block, block boundaries.
LENGTHS = (1500, 11, 64, 150, 700)
FAMILIES = ("llama", "gemma3_text", "gpt_oss", "smollm3", "mistral", "gemma2", "qwen3")

# Nats. Ranks sum in another order, so float32's last bits differ; a value on the edge between two
# of a codec's steps may then fall to either side, as between one chunk size and another.
LIMITS = {"raw": 1e-8, "bf16": 1e-5, "int8": 1e-5, "int4": 1e-3}


@pytest.mark.parametrize(
    ("architecture", "ranks"),
    [("llama", 2), ("llama", 3), ("llama", 8), *zip(FAMILIES[1:], (4, 2, 3, 8, 3, 4), strict=True)],
)
def test_every_family_equals_one_rank(
    architecture: str, ranks: int, model_folders: ModelFolders
) -> None:
    folder = model_folders(architecture)
    prompts = [some_ids(length, seed) for seed, length in enumerate(LENGTHS)]
    both = SideBySide(folder, ranks, one={}, max_batch_tokens=1024)
    first = [ask(f"{index}", prompt) for index, prompt in enumerate(prompts)]
    assert both.finish(*first) < LIMITS["raw"]
    # Again, and longer: now with cached blocks of the first round.
    again = [ask(f"again {i}", p, some_ids(40, 9 + i)) for i, p in enumerate(prompts)]
    assert both.finish(*again) < LIMITS["raw"]
    both.many.assert_idle()


def test_several_ranks_equal_eager(llama: Path) -> None:
    engine = ringed_engine(llama, 3, max_batch_tokens=512)
    engine.finish(*(ask(f"{n}", some_ids(n, n)) for n in LENGTHS))
    assert_equals_eager(engine, Eager(llama))


@pytest.mark.parametrize("name", MODELS)
def test_the_embedded_models_equal_one_rank(name: str) -> None:
    both = SideBySide(model_path(name), 4, one={}, max_batch_tokens=1024, dtype="float32")
    assert both.finish(ask("long", some_ids(2500, 1)), ask("short", some_ids(90, 2))) < 1e-8


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_what_a_codec_loses_does_not_depend_on_ranks(codec: str, llama: Path) -> None:
    for ranks in (2, 4):
        both = SideBySide(llama, ranks, one={}, codec=codec, max_batch_tokens=600)
        requests = [ask(f"{n}", some_ids(n, n)) for n in LENGTHS]
        assert both.finish(*requests) < LIMITS[codec]


@settings(deadline=None, max_examples=8)
@given(
    family=st.sampled_from(FAMILIES),
    ranks=st.sampled_from([2, 3, 4, 8]),
    codec=st.sampled_from(sorted(CODECS)),
    max_batch_tokens=st.sampled_from([17, 64, 96, 200, 512, 1024]),
    lengths=st.lists(st.integers(1, 1300), min_size=1, max_size=3),
    choices=st.integers(1, 3),
    shared=st.integers(0, 300),
    answer=st.integers(1, 20),
)
def test_any_batch_equals_one_rank(
    model_folders: ModelFolders,
    family: str,
    ranks: int,
    codec: str,
    max_batch_tokens: int,
    lengths: list[int],
    choices: int,
    shared: int,
    answer: int,
) -> None:
    """Ragged batches of prompts and answers, prefix hits, waiting for each other, forks."""
    both = SideBySide(
        model_folders(family), ranks, one={}, codec=codec, max_batch_tokens=max_batch_tokens
    )
    beginning = some_ids(shared, 77)
    for round_name in ("first", "second"):
        requests = [
            ask(
                f"{round_name} {index}",
                beginning + some_ids(length, index),
                max_tokens=answer,
                n=choices,
                temperature=float(choices > 1),
                seed=index,
            )
            for index, length in enumerate(lengths)
        ]
        assert both.finish(*requests) < LIMITS[codec]
    both.many.assert_idle()


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_preemption_changes_nothing(
    architecture: str, ranks: int, model_folders: ModelFolders
) -> None:
    """Short sequences are on rank 0 alone, whose pool is as small as that of a single rank."""
    layers = 3 if architecture == "llama" else 4
    small = {"pool_gib": gib_of_blocks(12, layers)}
    both = SideBySide(model_folders(architecture), ranks, one={}, max_batch_tokens=96, **small)
    requests = [
        ask(f"{i}", some_ids(length, i), max_tokens=150)
        for i, length in enumerate((180, 190, 200, 60))
    ]
    assert both.finish(*requests) < LIMITS["raw"]
    assert both.many.preemptions > 0, "the pool is too large to show anything"
    both.many.assert_idle()


def test_questions_on_documents_equal_one_rank(gemma3: Path) -> None:
    both = SideBySide(gemma3, 3, one={}, max_batch_tokens=512, pool_gib=0.05)
    for engine in (both.one, both.many):
        engine.open_document("a", np.array(some_ids(1800, 1), dtype=np.int32))
    opening = some_ids(7, 1)
    both.one.finish(ask("read", opening, "a", max_tokens=0))
    both.many.finish(ask("read", opening, "a", max_tokens=0))
    questions = [ask(f"{n}", opening, "a", some_ids(n, n)) for n in (9, 80, 200)]
    assert both.finish(*questions) < LIMITS["raw"]
    assert both.many.answered["9"].counts.cached_tokens == 1792
    both.many.assert_idle()


def test_what_many_ranks_cannot_do_is_refused(llama: Path) -> None:
    engine = ringed_engine(llama, 2)
    with pytest.raises(InvalidRequest, match="start it without --ranks"):
        engine.open_module("m", [Piece(token_ids=tuple(some_ids(100, 0)), position=0)])
    gap = (Segment(token_ids=(5, 6)), Segment(token_ids=(7, 8), position=40))
    with pytest.raises(InvalidRequest, match="start it without --ranks"):
        engine.submit(Request(request_id="gap", segments=gap))


def test_answers_are_scored_and_prompts_are_refused(llama: Path) -> None:
    engine = ringed_engine(llama, 2)
    request = ask("a", some_ids(100, 1), max_tokens=2)
    told = replace(request, sampling=replace(request.sampling, logprobs=2))
    engine.submit(told)
    outputs = []
    while engine.has_work:
        outputs += [output for output in engine.step() if output.token_ids]
    assert [len(output.logprobs) for output in outputs] == [1, 1]
    scored = replace(request, sampling=replace(request.sampling, prompt_logprobs=2))
    with pytest.raises(InvalidRequest, match="for one rank") as caught:
        engine.submit(scored)
    assert caught.value.param == "prompt_logprobs"

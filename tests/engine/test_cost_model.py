"""The cost model finds the truth behind noisy steps, forgets nothing, and its chunks fit."""

import bisect
import csv
import math
import random
import statistics
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.engine.cost_model import Coefficients, CostModel, StepWork

TRUTH = Coefficients(step=0.02, token=1.5e-3, pair=3e-8, answer=2e-3, context=2e-7)


def prompt(tokens: int, past: int) -> StepWork:
    work = StepWork()
    work.add_prompt(tokens, past)
    return work


def answers(*contexts: int) -> StepWork:
    work = StepWork()
    for context in contexts:
        work.add_answer(context)
    return work


def random_work(choose: random.Random) -> StepWork:
    number = choose.choice([0, 0, 1, 4, 8])
    work = answers(*(choose.randint(1, 60_000) for _ in range(number)))
    if number == 0 or choose.random() < 0.5:
        work.add_prompt(choose.choice([16, 64, 128, 512]), choose.randint(0, 60_000))
    return work


def test_it_learns_from_noisy_steps_with_outliers() -> None:
    choose, truth, model = random.Random(7), CostModel(TRUTH), CostModel()
    for _ in range(1000):
        work = random_work(choose)
        seconds = truth.seconds(work) * choose.lognormvariate(0, 0.1)
        model.observe(work, seconds * (10 if choose.random() < 0.05 else 1))
    for _ in range(100):
        work = random_work(choose)
        assert model.seconds(work) == pytest.approx(truth.seconds(work), rel=0.2)
    assert model.median_error is not None and model.median_error < 0.12


def test_a_night_of_decoding_does_not_make_it_forget_what_a_prompt_costs() -> None:
    choose, truth, model = random.Random(8), CostModel(TRUTH), CostModel()
    for past in range(0, 60_000, 500):
        model.observe(prompt(128, past), truth.seconds(prompt(128, past)))
    for _ in range(20_000):
        work = answers(choose.randint(1, 60_000))
        model.observe(work, truth.seconds(work))
    assert model.seconds(prompt(128, 50_000)) == pytest.approx(
        truth.seconds(prompt(128, 50_000)), rel=0.05
    )


def test_it_follows_a_machine_that_becomes_slower() -> None:
    truth, model = CostModel(TRUTH), CostModel()
    for slowness in (1.0, 3.0):
        for past in [*range(0, 60_000, 2500)] * 10:
            for work in (prompt(128, past), answers(past + 1)):
                model.observe(work, slowness * truth.seconds(work))
    assert model.seconds(prompt(128, 50_000)) == pytest.approx(
        3 * truth.seconds(prompt(128, 50_000)), rel=0.15
    )


def test_recorded_steps_are_predicted_within_a_fifth_at_every_depth() -> None:
    """The embedded model on one thread: chats beside documents of 6,000 and 60,000 tokens, twice.

    Seconds are of the processor, since the machine had other work.
    """
    with (Path(__file__).parent / "recorded_steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    model, errors = CostModel(), defaultdict(list)
    for row in rows:
        work = StepWork(
            prompt_tokens=int(row["prompt_tokens"]),
            prompt_pairs=float(row["prompt_pairs"]),
            answers=int(row["answers"]),
            context_tokens=int(row["context_tokens"]),
        )
        seconds = float(row["ms"]) / 1000
        if int(row["round"]) == 2:
            past = work.prompt_pairs / max(work.prompt_tokens, 1)
            band = bisect.bisect([4_000, 16_000, 40_000], past) if work.prompt_tokens else -1
            errors[band].append(abs(model.seconds(work) - seconds) / seconds)
        model.observe(work, seconds)
    assert sorted(errors) == [-1, 0, 1, 2, 3] and len(errors[3]) >= 30
    for band, own in errors.items():
        assert statistics.median(own) < 0.2, band


def test_what_was_not_measured_since_stays_as_it_was_known() -> None:
    model = CostModel(TRUTH)
    for _ in range(50):
        model.observe(answers(100), 0.5)
    assert model.chunk_seconds(128, 1000) == pytest.approx(
        CostModel(TRUTH).chunk_seconds(128, 1000)
    )
    assert model.seconds(answers(100)) == pytest.approx(0.5, rel=0.05)


POSITIVE = st.floats(1e-9, 1.0)


@given(st.lists(st.tuples(POSITIVE, st.integers(1, 4096), st.integers(0, 10**6)), max_size=40))
def test_no_coefficient_is_negative_whatever_was_measured(
    steps: list[tuple[float, int, int]],
) -> None:
    model = CostModel()
    for seconds, tokens, past in steps:
        model.observe(prompt(tokens, past), seconds)
        model.observe(answers(past), seconds)
    per = model.coefficients
    assert min(per.step, per.token, per.pair, per.answer, per.context) >= 0
    assert math.isfinite(model.seconds(prompt(64, 10**6)))


@given(
    token=st.floats(0, 0.01),
    pair=st.floats(1e-12, 1e-5),
    past=st.integers(0, 10**6),
    seconds=st.floats(1e-4, 10),
)
def test_the_longest_chunk_takes_the_time_that_it_may(
    token: float, pair: float, past: int, seconds: float
) -> None:
    model = CostModel(Coefficients(token=token, pair=pair))
    tokens = model.chunk_tokens(seconds, past)
    taken = token * tokens + pair * tokens * (past + tokens / 2)
    assert taken == pytest.approx(seconds, rel=1e-6)
    assert model.chunk_tokens(0, past) == 0


def test_what_was_learned_is_kept_for_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "times" / "model.json"
    first, truth = CostModel(path=path), CostModel(TRUTH)
    assert not first.known
    for past in range(0, 60_000, 2000):
        first.observe(prompt(128, past), truth.seconds(prompt(128, past)))
    first.save()
    second = CostModel(path=path)
    assert second.known and second.coefficients == first.coefficients
    path.write_text('{"step": -1}')
    assert not CostModel(path=path).known
    path.write_text("{")
    assert not CostModel(path=path).known

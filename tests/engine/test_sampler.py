"""Each law of sampling against an obvious twin, and what a sampled token must not depend on."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.engine.sampler import (
    ORDERED_TOKENS,
    STREAM_BLOCK,
    SamplingError,
    SamplingState,
    sample,
)
from longctx.request import SamplingParams

VOCAB = 24


def no_prompt() -> np.ndarray:
    raise AssertionError("the prompt is read only for a repetition penalty")


def state_of(
    params: SamplingParams, *, seed: int = 0, prompt: list[int] | None = None
) -> SamplingState:
    return SamplingState(
        params,
        seed=seed,
        prompt_token_ids=no_prompt if prompt is None else lambda: np.array(prompt, dtype=np.int64),
    )


def sample_one(logits: torch.Tensor, state: SamplingState) -> int:
    (token,) = sample(logits[None], [state])
    assert isinstance(token, int)
    return token


def slow_shares(
    logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]
) -> list[float]:
    """Return the distribution that one row is sampled from, by the letter, not normalized."""
    scores = np.array(logits, dtype=np.float32)
    for token, bias in params.logit_bias.items():
        scores[token] += np.float32(bias)
    for token in set(prompt) | set(output):
        penalty = np.float32(params.repetition_penalty)
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in set(output):
        scores[token] -= np.float32(params.frequency_penalty) * output.count(token)
    for token in set(output):
        scores[token] -= np.float32(params.presence_penalty)
    peak = max(float(score) for score in scores)
    if params.temperature == 0:
        best = [float(score) for score in scores].index(peak)
        return [float(token == best) for token in range(len(logits))]
    shares = [math.exp((float(score) - peak) / params.temperature) for score in scores]
    if params.top_k:
        kth = sorted(shares, reverse=True)[min(params.top_k, len(shares)) - 1]
        shares = [share if share >= kth else 0.0 for share in shares]
    if params.top_p < 1:
        wanted, running, kept = params.top_p * sum(shares), 0.0, set()
        for token in sorted(range(len(shares)), key=lambda token: (-shares[token], token)):
            kept.add(token)
            running += shares[token]
            if running >= wanted:
                break
        shares = [share if token in kept else 0.0 for token, share in enumerate(shares)]
    return [share if share >= params.min_p else 0.0 for share in shares]


def slow_draw(shares: list[float], uniform: float) -> int:
    target = uniform * sum(shares)
    for token, share in enumerate(shares):
        target -= share
        if target < 0:
            return token
    return max(token for token, share in enumerate(shares) if share > 0)


tokens = st.integers(0, VOCAB - 1)
some_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.9, 0.51, 0.013]),
    top_k=st.sampled_from([0, 1, 3, 10, 500]),
    min_p=st.sampled_from([0.0, 0.07, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.5, -0.75]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -0.5]),
    logit_bias=st.dictionaries(tokens, st.sampled_from([-100.0, -1.0, 2.5]), max_size=3),
)
# Quarters collide often, which is where the laws are subtle.
some_logits = st.lists(
    st.integers(-20, 20).map(lambda quarter: quarter / 4), min_size=VOCAB, max_size=VOCAB
)
some_rows = st.lists(
    st.tuples(
        some_logits,
        some_params,
        st.lists(tokens, max_size=6),
        st.lists(tokens, max_size=6),
        st.integers(0, 2**63 - 1),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(some_rows)
def test_every_law_equals_its_slow_twin_in_any_mixture_of_rows(rows: list[Any]) -> None:
    states = []
    for _, params, prompt, output, seed in rows:
        state = state_of(params, seed=seed, prompt=prompt)
        for token in output:
            state.observe(token)
        states.append(state)
    logits = torch.tensor([row[0] for row in rows], dtype=torch.float32)
    before = logits.clone()
    sampled = sample(logits, states)
    assert torch.equal(logits, before)
    for token, state, (scores, params, prompt, output, _) in zip(
        sampled, states, rows, strict=True
    ):
        shares = slow_shares(scores, params, prompt, output)
        assert token == slow_draw(shares, state.uniform())


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=300, temperature=2.0),
        SamplingParams(top_k=5000, top_p=0.7, temperature=5.0),
        SamplingParams(top_p=0.3, temperature=9.0),
        SamplingParams(top_p=0.999999, temperature=9.0),
        SamplingParams(min_p=0.4, temperature=3.0),
        SamplingParams(top_p=0.2),
    ],
)
def test_filters_that_keep_many_tokens_equal_their_slow_twin(params: SamplingParams) -> None:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(5, 20 * ORDERED_TOKENS, generator=generator)
    rows = (rows * 8).round() / 8  # hundreds of equals
    states = [state_of(params, seed=seed) for seed in range(5)]
    expected = [
        slow_draw(slow_shares(row.tolist(), params, [], []), state.uniform())
        for row, state in zip(rows, states, strict=True)
    ]
    assert sample(rows, states) == expected


def test_samples_follow_the_distribution() -> None:
    params = SamplingParams(temperature=0.8, top_p=0.95)
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
    shares = np.array(slow_shares(logits.tolist(), params, [], []))
    samples = 20_000
    found = np.zeros(VOCAB)
    for seed in range(4):
        states = [state_of(params, seed=seed * 100_000 + row) for row in range(samples // 4)]
        for token in sample(logits.expand(samples // 4, VOCAB), states):
            assert isinstance(token, int)
            found[token] += 1
    expected = shares / shares.sum() * samples
    kept = expected > 0
    assert found[~kept].sum() == 0
    chi_square = ((found - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_steps_of_one_seed_are_as_uniform_as_seeds() -> None:
    state = state_of(SamplingParams(), seed=11)
    numbers = []
    for _ in range(10 * STREAM_BLOCK):
        numbers.append(state.uniform())
        state.observe(0)
    assert len(set(numbers)) == len(numbers)
    assert abs(np.mean(numbers) - 0.5) < 0.05
    assert np.abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.15
    whole = np.random.Philox(key=11).random_raw(len(numbers)) >> np.uint64(11)
    assert numbers == list(whole * 2.0**-53)


def test_a_seed_repeats_and_another_seed_differs() -> None:
    logits = torch.zeros(1000)

    def text(seed: int) -> list[int]:
        state = state_of(SamplingParams(), seed=seed)
        sampled = []
        for _ in range(20):
            sampled.append(sample_one(logits, state))
            state.observe(sampled[-1])
        return sampled

    assert text(5) == text(5)
    assert text(5) != text(6)
    assert text(-1) == text(-1)


def test_neighbors_and_their_order_change_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 3000, generator=generator)
    choices = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.3),
        SamplingParams(top_p=0.8),
        SamplingParams(top_k=20, frequency_penalty=0.5),
        SamplingParams(top_p=0.99, temperature=5.0),  # needs the whole row in order
    ]

    def states() -> list[SamplingState]:
        return [state_of(choices[row % len(choices)], seed=row) for row in range(40)]

    together = sample(logits, states())
    backwards = sample(logits.flip(0), states()[::-1])[::-1]
    alone = [sample_one(row, state) for row, state in zip(logits, states(), strict=True)]
    assert together == backwards == alone


def test_a_fork_keeps_the_past_and_goes_its_own_way() -> None:
    params = SamplingParams(temperature=0.0, frequency_penalty=2.0, repetition_penalty=1.1)
    parent = state_of(params, seed=1, prompt=[3])
    logits = torch.linspace(1.0, 2.0, VOCAB)
    first = sample_one(logits, parent)
    parent.observe(first)
    assert sample_one(logits, parent) != first
    child = parent.fork(2)
    assert child.step == parent.step == 1
    assert child.uniform() != parent.uniform()
    for _ in range(3):
        parent.observe(sample_one(logits, parent))
    assert sample_one(logits, child) == VOCAB - 2  # only `first` counts against it


def test_equal_logits_give_the_smallest_id() -> None:
    greedy = state_of(SamplingParams(temperature=0.0))
    assert sample_one(torch.tensor([1.0, 4.0, 4.0, 4.0]), greedy) == 1
    narrow = state_of(SamplingParams(top_p=0.01))
    assert sample_one(torch.tensor([1.0, 4.0, 4.0, 4.0]), narrow) == 1


def test_a_forbidden_token_is_never_sampled() -> None:
    logits = torch.full((8,), float("-inf"))
    logits[5] = -3.0
    for seed in range(20):
        assert sample_one(logits, state_of(SamplingParams(temperature=100.0), seed=seed)) == 5


def test_a_tiny_temperature_is_greedy_without_overflow() -> None:
    logits = torch.tensor([1e4, 1.0001e4, -1e30])
    assert sample_one(logits, state_of(SamplingParams(temperature=1e-12))) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_logits_are_named_for_their_row_alone(value: float, temperature: float) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, 7] = 50.0
    logits[1, 2] = value
    params = SamplingParams(temperature=temperature)
    first, second, third = sample(logits, [state_of(params, seed=row) for row in range(3)])
    assert (first, third) == (7, 7)
    assert isinstance(second, SamplingError)
    assert "no usable logits" in str(second)


def test_a_row_without_any_possible_token_is_an_error() -> None:
    (result,) = sample(torch.full((1, 4), float("-inf")), [state_of(SamplingParams())])
    assert isinstance(result, SamplingError)


def test_a_bias_outside_the_vocabulary_is_an_error_of_its_row() -> None:
    outside = state_of(SamplingParams(logit_bias={VOCAB: 1.0}))
    result, other = sample(torch.zeros(2, VOCAB), [outside, state_of(SamplingParams())])
    assert isinstance(result, SamplingError)
    assert f"0 to {VOCAB - 1}" in str(result)
    assert isinstance(other, int)


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.zeros(0, VOCAB), []) == []


def test_the_prompt_is_read_once() -> None:
    reads = []

    def prompt() -> np.ndarray:
        reads.append(1)
        return np.array([4, 4, 9])

    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    state = SamplingState(params, seed=0, prompt_token_ids=prompt)
    logits = torch.zeros(VOCAB)
    logits[4], logits[9], logits[11] = 1.9, 1.5, 1.0
    for _ in range(3):
        assert sample_one(logits, state) == 11
    assert reads == [1]

"""Merging partial attention is attention over the union of the keys."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longctx.attention.merge import merge, merge_sink

HEADS, HEAD_DIM = 3, 8
TOLERANCE = 1e-5


def dense(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """float64 softmax over `scores` [tokens, heads, keys] of `values` [keys, heads, head_dim]."""
    if scores.shape[-1] == 0:
        return torch.zeros(*scores.shape[:2], HEAD_DIM), torch.full(scores.shape[:2], -torch.inf)
    weights = torch.softmax(scores.double(), dim=-1)
    out = torch.einsum("thk,khd->thd", weights, values.double())
    return out.float(), torch.logsumexp(scores.double(), dim=-1).float()


def case(seed: int, tokens: int, keys: int, spread: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, HEADS, keys, generator=generator) * spread
    return scores, torch.randn(keys, HEADS, HEAD_DIM, generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 4),
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    spread=st.sampled_from([0.1, 1.0, 30.0, 1000.0]),
)
def test_parts_in_any_number_and_size_merge_to_the_dense_softmax(
    seed: int, tokens: int, sizes: list[int], spread: float
) -> None:
    scores, values = case(seed, tokens, sum(sizes), spread)
    out, lse = torch.zeros(tokens, HEADS, HEAD_DIM), torch.full((tokens, HEADS), -torch.inf)
    parts = zip(scores.split(sizes, dim=-1), values.split(sizes), strict=True)
    for part_scores, part_values in parts:
        out, lse = merge(out, lse, *dense(part_scores, part_values))
    expected_out, expected_lse = dense(scores, values)
    torch.testing.assert_close(out, expected_out, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(lse, expected_lse, atol=TOLERANCE, rtol=TOLERANCE)


def test_the_order_of_two_sides_does_not_matter() -> None:
    scores, values = case(0, 4, 10, 3.0)
    a = dense(scores[..., :4], values[:4])
    b = dense(scores[..., 4:], values[4:])
    for left, right in zip(merge(*a, *b), merge(*b, *a), strict=True):
        torch.testing.assert_close(left, right)


def test_an_empty_side_is_ignored_whatever_its_out_holds() -> None:
    out, lse = dense(*case(0, 2, 5, 1.0))
    rubbish = torch.full_like(out, torch.nan)
    nothing = torch.full_like(lse, -torch.inf)
    for merged in (merge(out, lse, rubbish, nothing), merge(rubbish, nothing, out, lse)):
        torch.testing.assert_close(merged[0], out)
        torch.testing.assert_close(merged[1], lse)


def test_two_empty_sides_are_empty() -> None:
    nothing = torch.full((2, HEADS), -torch.inf)
    out, lse = merge(
        torch.full((2, HEADS, 4), torch.nan), nothing, torch.ones(2, HEADS, 4), nothing
    )
    assert not out.any()
    assert (lse == -torch.inf).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), keys=st.integers(0, 9), level=st.floats(-50, 50, width=32))
def test_a_sink_is_one_more_key_whose_value_is_zero(seed: int, keys: int, level: float) -> None:
    scores, values = case(seed, 3, keys, 2.0)
    sinks = torch.tensor([level, -1.0, 1.0])
    column = sinks[None, :, None].expand(3, -1, 1)
    expected = dense(torch.cat([scores, column], -1), torch.cat([values, torch.zeros(1, HEADS, 8)]))
    merged = merge_sink(*dense(scores, values), sinks)
    for left, right in zip(merged, expected, strict=True):
        torch.testing.assert_close(left, right, atol=TOLERANCE, rtol=TOLERANCE)

"""Neighbors and preemption change no answer: with our kernels not a bit of any logits.

torch multiplies bfloat16 in an order that depends on the number of rows, so without them the logits
of a row differ by its neighbors, by less than bfloat16 is from float32. Every other part of a step
computes a row alike whatever is beside it.
"""

from pathlib import Path
from typing import Literal

import pytest
import torch

from longctx.attention.registry import BACKENDS
from longctx.request import Request
from tests.support.recorded_engine import (
    Eager,
    RecordedEngine,
    ask,
    build_engine,
    gib_of_blocks,
    some_ids,
)

ANSWERS = 8
ANSWER_TOKENS = 150
POOL_BLOCKS = 16  # of the 32 that all answers take

DType = Literal["float32", "bfloat16"]


def requests(*, seeded: bool) -> list[Request]:
    sampling = {"temperature": 1.0} if seeded else {}
    return [
        ask(
            f"{number}",
            some_ids(20 + 11 * number, number),
            max_tokens=ANSWER_TOKENS,
            seed=number if seeded else None,
            **sampling,  # type: ignore[arg-type]
        )
        for number in range(ANSWERS)
    ]


def engine_of(folder: Path, dtype: DType, codec: str, blocks: int) -> RecordedEngine:
    pool_gib = gib_of_blocks(blocks, codec=codec) / (2 if dtype == "bfloat16" else 1)
    return build_engine(folder, dtype=dtype, codec=codec, pool_gib=pool_gib)


def run(folder: Path, dtype: DType, codec: str, *, seeded: bool) -> tuple[RecordedEngine, ...]:
    """Each request alone, all of them together, and together where they have no room."""
    alone = engine_of(folder, dtype, codec, 400)
    for request in requests(seeded=seeded):
        alone.finish(request)
    beside = engine_of(folder, dtype, codec, 400)
    crowded = engine_of(folder, dtype, codec, POOL_BLOCKS)
    for engine in (beside, crowded):
        engine.finish(*requests(seeded=seeded))
    assert alone.preemptions == beside.preemptions == 0
    assert crowded.preemptions > 0, "the pool is too large to show anything"
    return alone, beside, crowded


@pytest.mark.skipif("cpu" not in BACKENDS, reason="torch's kernels depend on the rows beside")
@pytest.mark.parametrize("seeded", [False, True], ids=["greedy", "seeded"])
@pytest.mark.parametrize(
    ("dtype", "codec"),
    [
        ("float32", "raw"),
        ("float32", "int8"),
        ("float32", "int4"),
        ("bfloat16", "raw"),
        ("bfloat16", "int8"),
    ],
)
def test_not_a_bit_depends_on_neighbors_or_preemption(
    dtype: DType, codec: str, seeded: bool, llama: Path
) -> None:
    alone, *others = run(llama, dtype, codec, seeded=seeded)
    for other in others:
        for name, rows in alone.logits.items():
            assert other.tokens_of(name) == alone.tokens_of(name)
            assert rows.keys() == other.logits[name].keys()
            assert all(torch.equal(row, other.logits[name][at]) for at, row in rows.items())


@pytest.mark.parametrize("seeded", [False, True], ids=["greedy", "seeded"])
def test_in_bfloat16_they_change_less_than_its_own_rounding(seeded: bool, llama: Path) -> None:
    alone, *others = run(llama, "bfloat16", "raw", seeded=seeded)
    eager = Eager(llama)
    rounding, changes = [], []
    for name, rows in alone.logits.items():
        tokens = alone.tokens_of(name)
        exact = eager.rows(tokens)
        rounding += [float((row - exact[at - 1]).abs().max()) for at, row in rows.items()]
        for other in others:
            # As long as the same tokens were sampled: from there on it is another answer.
            for at, row in sorted(rows.items()):
                if other.tokens_of(name)[:at] != tokens[:at]:
                    break
                changes.append(float((row - other.logits[name][at]).abs().max()))
    assert len(changes) > ANSWERS * ANSWER_TOKENS / 2, "answers part too early to say anything"
    assert max(changes) < max(rounding)
    assert sum(changes) / len(changes) < sum(rounding) / len(rounding) / 4

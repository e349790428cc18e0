"""What every tier below the device promises, whatever it is made of."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from offload.block_run import PageSlots
from offload.eviction import LRU
from offload.host import HostTier
from offload.key import GroupKey
from offload.tier import DurableTier, MemoryTier
from offload.tier_names import TIERS
from offload.tier_stack import TierStack
from tests.offload.extents import PAGE_BYTES, is_right, keys_of, open_tier, run_of
from tests.offload.extents import filled as filled_slots

AnyTier = MemoryTier | DurableTier


def host_tier(folder: Path) -> HostTier:
    capacity_bytes = 100 * sum(PAGE_BYTES)
    return HostTier(capacity_bytes=capacity_bytes, page_bytes=PAGE_BYTES, policy=LRU[GroupKey]())


MAKERS: dict[str, Callable[[Path], AnyTier]] = {
    "host": host_tier,
    "disk": lambda folder: open_tier(folder / "kv"),
}


@pytest.fixture(params=sorted(MAKERS))
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AnyTier]:
    with closing(MAKERS[request.param](tmp_path)) as tier:
        assert tier.name == request.param
        yield tier


@pytest.fixture
def stack(tier: AnyTier) -> TierStack:
    """The tier alone in a stack. It holds ten blocks of chain a, and two of them in group 1 too."""
    stack = TierStack([tier])
    for run in (run_of("a", 0, 10), run_of("a", 8, 2, group=1)):
        stored = stack.write(run, filled_slots(run), cost_seconds=1.0, retained=False)
        assert stored == tier.durable
    return stack


def read(stack: TierStack, group: int, first: int, count: int) -> list[bool]:
    """Read blocks of chain a; return which arrive, and fail if one of them is wrong."""
    keys = keys_of("a", first, count)
    slots = filled_slots(run_of("other", 0, count, group=group))
    found = stack.read(group, keys, slots, None)
    right = is_right(group, keys, slots)
    assert all(page for here, page in zip(found, right, strict=True) if here), "a wrong page"
    return found


def test_every_tier_is_tested_here() -> None:
    assert {"device", *MAKERS} == set(TIERS)


def test_what_was_written_is_found_and_read(stack: TierStack, tier: AnyTier) -> None:
    assert all(stack.holder(0, key) == tier.name for key in keys_of("a", 0, 10))
    assert read(stack, 0, 2, 11) == [True] * 8 + [False] * 3
    assert read(stack, 1, 7, 3) == [False, True, True]


def test_layers_may_be_read_alone(stack: TierStack) -> None:
    keys = keys_of("a", 3, 2)
    second = PageSlots((np.zeros((2, PAGE_BYTES[1]), np.uint8),), (1, 0), first_layer=1)
    assert stack.read_layers(0, keys, second) == [True, True]
    assert all(is_right(0, keys, second))


def test_what_is_dropped_is_gone_in_every_group_and_the_reason_is_known(stack: TierStack) -> None:
    stack.drop(keys_of("a", 8, 2))
    assert read(stack, 0, 7, 3) == [True, False, False]
    assert read(stack, 1, 8, 2) == [False, False]
    assert stack.explain(0, keys_of("a", 8, 1)[0]) == "deleted"
    assert stack.explain(0, keys_of("a", 7, 1)[0]) is None
    assert stack.explain(0, keys_of("never", 0, 1)[0]) is None


def test_what_was_dropped_may_be_written_again(stack: TierStack) -> None:
    run = run_of("a", 0, 10)
    stack.drop(run.keys)
    stack.write(run, filled_slots(run), cost_seconds=1.0, retained=False)
    assert read(stack, 0, 0, 10) == [True] * 10


def test_keys_that_are_not_here_may_be_used_retained_released_and_dropped(stack: TierStack) -> None:
    keys = keys_of("never", 0, 3)
    for call in (stack.use, stack.retain, stack.release, stack.drop):
        call(keys)
    assert read(stack, 0, 0, 10) == [True] * 10


def test_only_memory_can_be_emptied(stack: TierStack, tier: AnyTier) -> None:
    if tier.durable:
        assert stack.memory_tiers == []
        return
    assert stack.memory_tiers == [tier.name]
    assert stack.clear(tier.name) == (12, 12 * sum(PAGE_BYTES))
    assert not any(read(stack, 0, 0, 10))
    assert stack.explain(0, keys_of("a", 0, 1)[0]) == "flushed"


def test_stats_count_what_is_here_and_what_was_asked_for(stack: TierStack, tier: AnyTier) -> None:
    read(stack, 0, 8, 4)
    stats = stack.stats()[tier.name]
    assert stats.blocks == 12
    assert stats.held_bytes >= 12 * sum(PAGE_BYTES)
    assert stats.hits == 2
    assert stats.misses >= 0

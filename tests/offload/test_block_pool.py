"""A block pool gives, shares, caches and takes back pages as a plain model of it says."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from offload.block_pool import NO_PAGE, BlockPool
from offload.key import BlockKey, chain_keys, namespace


def pool_of(pages: int) -> BlockPool:
    return BlockPool(page_bytes=[4, 8], num_pages=pages + 1, device=torch.device("cpu"))


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(32, "little"))


class PoolMachine(RuleBasedStateMachine):
    """The pool beside dictionaries that say what each page must be."""

    @initialize(pages=st.integers(1, 12))
    def start(self, pages: int) -> None:
        self.pool = pool_of(pages)
        self.refs: dict[int, int] = {}
        self.key_of: dict[int, BlockKey] = {}
        self.resting: OrderedDict[int, None] = OrderedDict()
        self.superseded: OrderedDict[int, None] = OrderedDict()

    @rule(share=st.floats(0, 1))
    def allocate(self, share: float) -> None:
        count = int(share * self.pool.available)
        free = self.pool.capacity - len(self.refs) - len(self.resting) - len(self.superseded)
        pages = self.pool.allocate(count)
        assert len(set(pages)) == count and NO_PAGE not in pages
        assert pages == sorted(pages)
        for _ in range(count - free):  # cached ones leave in their order, superseded ones first
            page, _ = (self.superseded or self.resting).popitem(last=False)
            assert page in pages
            del self.key_of[page]
        for page in pages:
            assert page not in self.refs
            self.refs[page] = 1

    @precondition(lambda self: self.refs)
    @rule(data=st.data(), number=st.integers(0, 6))
    def publish(self, data: st.DataObject, number: int) -> None:
        page = data.draw(st.sampled_from(sorted(self.refs)))
        if page in self.key_of:
            return
        self.pool.publish(page, key(number))
        if key(number) not in self.key_of.values():
            self.key_of[page] = key(number)

    @precondition(lambda self: self.refs)
    @rule(data=st.data(), superseded=st.booleans())
    def let_go(self, data: st.DataObject, superseded: bool) -> None:
        pages = data.draw(st.lists(st.sampled_from(sorted(self.refs)), unique=True))
        (self.pool.supersede if superseded else self.pool.release)(pages)
        for page in reversed(pages):
            self.refs[page] -= 1
            if self.refs[page] == 0:
                del self.refs[page]
                if page in self.key_of:
                    (self.superseded if superseded else self.resting)[page] = None

    @rule(number=st.integers(0, 6))
    def find_and_acquire(self, number: int) -> None:
        found = self.pool.lookup(key(number))
        expected = [page for page, its_key in self.key_of.items() if its_key == key(number)]
        assert [found] == (expected or [None])
        if found is not None:
            self.pool.acquire([found])
            self.refs[found] = self.refs.get(found, 0) + 1
            self.resting.pop(found, None)
            self.superseded.pop(found, None)

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        pages = data.draw(st.lists(st.integers(1, self.pool.capacity), unique=True))
        unheld = [page for page in pages if page in self.resting or page in self.superseded]
        assert self.pool.forget(pages) == len(unheld)
        for page in unheld:
            self.resting.pop(page, None)
            self.superseded.pop(page, None)
            del self.key_of[page]

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "pool"):
            assert self.pool.held == len(self.refs)
            assert self.pool.available == self.pool.capacity - len(self.refs)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestBlockPool = PoolMachine.TestCase


def test_the_zero_page_is_never_given_out_and_stays_zero() -> None:
    pool = pool_of(5)
    assert NO_PAGE not in pool.allocate(5)
    assert all(not pages[NO_PAGE].any() for pages in pool.pages)


def test_low_pages_are_given_first_so_that_chains_lie_together() -> None:
    pool = pool_of(6)
    first = pool.allocate(4)
    pool.release(first[1:3])
    assert pool.allocate(3) == [2, 3, 5]


def test_leaves_leave_before_their_parents() -> None:
    pool = pool_of(3)
    chain = pool.allocate(3)
    for number, page in enumerate(chain):
        pool.publish(page, key(number))
    pool.release(chain)
    pool.allocate(1)
    assert pool.lookup(key(0)) is not None and pool.lookup(key(2)) is None


def test_asking_for_more_than_there_is_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="3 pages wanted, 2 available"):
        pool_of(2).allocate(3)


def test_releasing_twice_is_a_bug() -> None:
    pool = pool_of(2)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(pages)


# -- keys -------------------------------------------------------------------------------------


def space(**changes: str) -> BlockKey:
    parts = {"fingerprint": "f", "dtype": "d", "rope": "r", "codec": "raw", "salt": ""}
    return namespace(**(parts | changes), codec_version=1)  # type: ignore[arg-type]


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


def test_equal_text_after_equal_text_has_equal_keys_wherever_it_is_cut() -> None:
    tokens = np.arange(40, dtype=np.int32)
    whole = chain_keys(space(), tokens, first_position=0, block_tokens=8)
    head = chain_keys(space(), tokens[:16], first_position=0, block_tokens=8)
    rest = chain_keys(head[-1], tokens[16:], first_position=16, block_tokens=8)
    assert whole == head + rest
    assert len(set(whole)) == 5 and all(len(k) == 32 for k in whole)


def test_the_last_partial_block_has_no_key() -> None:
    assert len(chain_keys(space(), ids(1, 2, 3), first_position=0, block_tokens=2)) == 1
    assert chain_keys(space(), ids(), first_position=0, block_tokens=2) == []


def test_a_changed_token_changes_its_key_and_all_that_follow() -> None:
    base = chain_keys(space(), ids(1, 2, 3, 4, 5, 6), first_position=0, block_tokens=2)
    other = chain_keys(space(), ids(1, 2, 3, 9, 5, 6), first_position=0, block_tokens=2)
    assert base[0] == other[0] and base[1] != other[1] and base[2] != other[2]


def test_the_same_text_elsewhere_has_another_key() -> None:
    at_0 = chain_keys(space(), ids(1, 2), first_position=0, block_tokens=2)
    at_2 = chain_keys(space(), ids(1, 2), first_position=2, block_tokens=2)
    assert at_0 != at_2


def test_every_part_of_the_namespace_keeps_keys_apart() -> None:
    spaces = [space(), space(salt="a"), space(dtype="a"), space(rope="a"), space(codec="int8")]
    spaces += [space(fingerprint="a"), space(fingerprint="fd", dtype=""), space(salt="r", rope="")]
    assert len(set(spaces)) == len(spaces)


def test_keys_are_the_same_on_any_day() -> None:
    (first,) = chain_keys(space(), ids(1, 2), first_position=0, block_tokens=2)
    assert first.hex()[:16] == "f7960a45e2d409e8"

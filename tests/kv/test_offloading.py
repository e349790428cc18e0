"""Blocks that leave the device and come back: what is stored, what waits, what is pinned."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.shape import BLOCK_TOKENS
from longctx.engine.scheduler import SchedulerOutput
from longctx.engine.sequence import Sequence
from longctx.kv.cache_manager import KVCacheManager
from longctx.kv.offloading import KVOffloader
from longctx.model.spec import LayerSpec
from longctx.text.tokenizer import Tokenizer
from offload.eviction import LRU
from offload.host import HostTier
from offload.key import BlockKey
from offload.store import KVStore
from tests.support.bare_cache import GLOBAL, Bench, bare_cache, blocks, numbers, window_of

PATIENCE_SECONDS = 10.0


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Tokenizer:
    return Tokenizer(llama)


class TieredBench(Bench):
    """A bench over host memory, whose steps leave a page's key in the page."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seconds_of = self._compute
        self.computed_blocks = 0

    def _compute(self, output: SchedulerOutput) -> float:
        for chunk in output.chunks:
            sequence = chunk.sequence
            begin = sequence.blocks.computed // BLOCK_TOKENS
            end = (sequence.blocks.computed + chunk.num_tokens) // BLOCK_TOKENS
            self.computed_blocks += end - begin
            for group, table in enumerate(sequence.blocks.tables):
                for block in range(begin, min(end, sequence.blocks.known_keys)):
                    for layer, pages in enumerate(self.cache.memory.packed[group].pages):
                        page = int(table.entries[block, 0])
                        pages[page] = mark(sequence.blocks.key(block), group, layer)
        return 0.01

    def run(self, token_ids: list[int], **options: object) -> Sequence:
        """A prompt from submission to its end, and everything of it written."""
        sequence = self.add(token_ids, **options)
        self.settle()
        return sequence

    def settle(self) -> None:
        assert self.cache.offloader is not None
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.scheduler.running or self.scheduler.waiting or self.cache.offloader.busy:
            self.cache.poll_transfers()
            self.step()
            assert time.monotonic() < deadline, "it does not come to an end"

    def empty_device(self) -> None:
        """Let go of all that nobody holds, as other prompts would make it."""
        self.cache.resident_prefixes.clear()
        for pool in self.cache.memory.packed:
            pool.forget(range(1, pool.num_pages))


def mark(key: BlockKey, group: int, layer: int) -> int:
    return (key[0] + 31 * group + 7 * layer) % 256


def tiered(
    tokenizer: Tokenizer,
    *,
    layers: tuple[LayerSpec, ...] = (GLOBAL,),
    blocks: int = 200,
    host_bytes: int = 1 << 26,
    staged: bool = False,
) -> TieredBench:
    memory = bare_cache(blocks=blocks, layers=layers).memory
    page_bytes = [size for pool in memory.packed for size in pool.page_bytes]
    host = HostTier(capacity_bytes=host_bytes, page_bytes=page_bytes, policy=LRU())
    store = KVStore([host], read_deadline_seconds=5.0)
    return TieredBench(tokenizer, KVCacheManager(memory, KVOffloader(memory, store, staged=staged)))


@pytest.fixture
def bench(tokenizer: Tokenizer) -> Iterator[TieredBench]:
    bench = tiered(tokenizer)
    yield bench
    assert bench.cache.offloader is not None
    bench.cache.offloader.close(0.0)


def assert_marked(bench: TieredBench, token_ids: list[int]) -> int:
    """All blocks of the prompt that the device has hold what was computed; how many there are."""
    sequence = bench.sequence(token_ids)
    bench.cache.find_keys(sequence.blocks)
    found = 0
    for block in range(sequence.blocks.known_keys):
        for group, pool in enumerate(bench.cache.memory.packed):
            page = pool.lookup(sequence.blocks.key(block))
            if page is not None:
                found += 1
                for layer, pages in enumerate(pool.pages):
                    expected = mark(sequence.blocks.key(block), group, layer)
                    assert (pages[page] == expected).all(), (block, group, layer)
    return found


def assert_nothing_is_pinned(bench: TieredBench) -> None:
    assert bench.cache.offloader is not None and not bench.cache.offloader.busy
    assert bench.cache.memory.raw.held == 0
    for pool in bench.cache.memory.packed:
        assert pool.held == 0


@pytest.mark.parametrize("staged", [False, True])
def test_a_document_that_left_the_device_is_read_back_and_not_computed_again(
    tokenizer: Tokenizer, staged: bool
) -> None:
    bench = tiered(tokenizer, layers=(GLOBAL, window_of(64), GLOBAL), staged=staged)
    text = blocks(40)
    first = bench.run([*text, 1, 2], document=("report", len(text)))
    assert first.cached_tokens == 0
    bench.empty_device()
    before = bench.computed_blocks

    again = bench.run([*text, 3, 4, 5], document=("report", len(text)))

    assert again.cached_tokens == len(text)
    assert bench.computed_blocks == before
    assert assert_marked(bench, text) >= 40
    bench.empty_device()
    assert_nothing_is_pinned(bench)


def test_others_are_answered_while_a_document_is_on_its_way(bench: TieredBench) -> None:
    text = blocks(100)
    bench.run(text, document=("report", len(text)))
    bench.empty_device()
    waiting = bench.add([*text, 1], document=("report", len(text)), max_tokens=2)
    other = bench.add(numbers(50, 90_000), max_tokens=2)
    bench.step()
    assert waiting.blocks.offload.load is not None and waiting.blocks.computed == 0
    assert other.blocks.computed == 50
    bench.settle()
    assert waiting.cached_tokens == len(text)


def test_two_questions_on_a_document_that_left_read_it_once(bench: TieredBench) -> None:
    text = blocks(50)
    bench.run(text, document=("report", len(text)))
    bench.empty_device()
    first = bench.add([*text, 1], document=("report", len(text)))
    second = bench.add([*text, 2], document=("report", len(text)))
    bench.step()
    assert first.blocks.offload.load is not None and second.blocks.offload.load is None
    bench.settle()
    assert first.cached_tokens == second.cached_tokens == len(text)
    assert second.blocks.offload.loads == 0


def test_a_question_that_is_withdrawn_while_it_loads_leaves_nothing_pinned(
    bench: TieredBench,
) -> None:
    text = blocks(60)
    bench.run(text, document=("report", len(text)))
    bench.empty_device()
    sequence = bench.add([*text, 1], document=("report", len(text)))
    bench.step()
    assert sequence.blocks.offload.load is not None
    bench.scheduler.remove(sequence)
    bench.settle()
    assert_nothing_is_pinned(bench)
    assert bench.run([*text, 1], document=("report", len(text))).cached_tokens == len(text)


def test_a_fast_prefill_before_the_first_read_does_not_keep_a_document_from_being_read(
    bench: TieredBench,
) -> None:
    """How fast the tier is becomes known by reading; until then computing is no better."""
    text = blocks(32)
    bench.run(text, document=("report", len(text)))
    bench.empty_device()
    offloader = bench.cache.offloader
    assert offloader is not None
    offloader._seconds_per_token = 1e-12  # as fast as no tier is
    computed = bench.computed_blocks
    bench.run([*text, 1, 2], document=("report", len(text)))
    assert bench.computed_blocks == computed, "it was computed again"
    bench.empty_device()
    offloader._seconds_per_token = 1e-12
    bench.run([*text, 3, 4], document=("report", len(text)))
    assert bench.computed_blocks > computed, "now it is known that computing is faster"


def test_short_prompts_are_stored_when_they_are_seen_again(bench: TieredBench) -> None:
    assert bench.cache.offloader is not None
    short, long = numbers(300), numbers(1100, 5000)
    bench.run(short)
    assert bench.cache.offloader.store.stats().tiers["host"].held_bytes == 0
    bench.run(long)
    stored = bench.cache.offloader.store.stats().tiers["host"].held_bytes
    page_bytes = bench.cache.memory.packed[0].page_bytes[0]
    assert stored == 1100 // BLOCK_TOKENS * page_bytes
    bench.run(short)
    assert bench.cache.offloader.store.stats().tiers["host"].held_bytes == stored + 4 * page_bytes


def test_answers_are_not_stored(bench: TieredBench) -> None:
    assert bench.cache.offloader is not None
    bench.run(numbers(1024), max_tokens=200)
    page_bytes = bench.cache.memory.packed[0].page_bytes[0]
    assert bench.cache.offloader.store.stats().tiers["host"].held_bytes == 16 * page_bytes


def test_a_cancelled_prefill_goes_on_where_it_stood(bench: TieredBench) -> None:
    text = blocks(40)
    sequence = bench.add(text, document=("report", len(text)))
    for _ in range(10):
        bench.step()
    done = sequence.blocks.computed
    assert 0 < done < len(text)
    bench.scheduler.remove(sequence)
    bench.settle()
    bench.empty_device()
    assert bench.run(text, document=("report", len(text))).cached_tokens == done


def test_windows_take_a_bounded_share_of_what_is_stored(tokenizer: Tokenizer) -> None:
    bench = tiered(
        tokenizer, layers=(GLOBAL, window_of(64), window_of(64), window_of(64)), blocks=600
    )
    text = blocks(480)
    bench.run(text, document=("report", len(text)))
    assert bench.cache.offloader is not None
    page_bytes = bench.cache.memory.packed[0].page_bytes[0]
    stored = bench.cache.offloader.store.stats().tiers["host"].held_bytes
    assert 480 * page_bytes < stored <= 1.1 * 480 * page_bytes


@settings(max_examples=25, deadline=None)
@given(
    window=st.sampled_from([None, 24, 64, 200, 700]),
    first=st.integers(1, 30 * BLOCK_TOKENS),
    shared=st.integers(0, 30 * BLOCK_TOKENS),
    second=st.integers(1, 20 * BLOCK_TOKENS),
    lost=st.sets(st.integers(0, 29)),
)
def test_whatever_is_left_of_a_prompt_serves_another(
    tokenizer: Tokenizer, window: int | None, first: int, shared: int, second: int, lost: set[int]
) -> None:
    layers = (GLOBAL,) if window is None else (GLOBAL, window_of(window))
    bench = tiered(tokenizer, layers=layers, blocks=120)
    assert bench.cache.offloader is not None
    text = numbers(first)
    stored = bench.run(text, document=("report", len(text)))
    bench.empty_device()
    keys = [stored.blocks.key(block) for block in lost if block < stored.blocks.known_keys]
    bench.cache.offloader.store.retain("lost", keys)
    bench.cache.offloader.store.delete("lost")
    bench.cache.offloader.store.flush(PATIENCE_SECONDS)

    prompt = [*text[:shared], *numbers(second, 50_000)]
    before = bench.computed_blocks
    sequence = bench.run(prompt)

    assert sequence.cached_tokens is not None
    assert sequence.cached_tokens <= min(first, shared)
    assert bench.computed_blocks - before >= (len(prompt) - sequence.cached_tokens) // BLOCK_TOKENS
    assert_marked(bench, prompt)
    bench.empty_device()
    assert_nothing_is_pinned(bench)
    bench.cache.offloader.close(0.0)


def test_pages_of_a_deleted_document_leave_every_tier(bench: TieredBench) -> None:
    assert bench.cache.offloader is not None
    text = blocks(32)
    sequence = bench.run(text, document=("report", len(text)))
    keys = sequence.blocks.base_keys + tuple(sequence.blocks.tail_keys)
    bench.cache.offloader.store.retain("report", keys)
    bench.cache.close_document("report")
    bench.cache.erase("report")
    bench.cache.offloader.store.flush(PATIENCE_SECONDS)
    bench.settle()
    assert bench.cache.offloader.store.stats().tiers["host"].held_bytes == 0
    assert bench.cache.memory.packed[0].available == bench.cache.memory.packed[0].capacity
    assert bench.run(text, document=("report", len(text))).cached_tokens == 0

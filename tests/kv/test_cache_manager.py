"""Which blocks a prompt finds, which it computes, and what of a window is kept."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.shape import BLOCK_TOKENS
from longctx.engine.sequence import Sequence, SequenceState
from longctx.kv.block_table import BlockTable
from longctx.kv.cache_manager import Admission, KVCacheManager
from longctx.kv.layout import PLAIN
from longctx.kv.memory import LayerGroup, layer_groups
from longctx.kv.sequence_blocks import TokenIds
from longctx.text.tokenizer import Tokenizer
from offload.block_run import EXTENT_BLOCKS
from tests.support.bare_cache import GLOBAL, Bench, bare_cache, blocks, numbers, window_of


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Tokenizer:
    return Tokenizer(llama)


def matched(bench: Bench, token_ids: list[int]) -> int:
    """Tokens that a prompt finds when it is admitted."""
    sequence = bench.sequence(token_ids)
    assert bench.cache.admit(sequence.blocks, spare_blocks=0) is Admission.ADMITTED
    found = sequence.blocks.computed
    bench.cache.release(sequence.blocks)
    return found


def assert_all_free(cache: KVCacheManager) -> None:
    assert cache.memory.raw.held == 0
    for pool in cache.memory.packed:
        assert pool.held == 0 and pool.available == pool.capacity


# -- groups and windows -----------------------------------------------------------------------


def test_layers_with_equal_windows_share_a_group_and_global_ones_come_first() -> None:
    layers = [window_of(64), GLOBAL, window_of(64), window_of(128), GLOBAL]
    groups = layer_groups(layers)
    assert groups == (
        LayerGroup(None, (1, 4)),
        LayerGroup(64, (0, 2)),
        LayerGroup(128, (3,)),
    )


@given(window=st.integers(1, 300), position=st.integers(0, 2000))
def test_the_first_needed_block_holds_the_oldest_visible_key(window: int, position: int) -> None:
    oldest = max(0, position - window + 1)
    assert PLAIN.first_seen(window, position) == oldest // BLOCK_TOKENS


@pytest.mark.parametrize("window", [1, 24, 64, 65, 200])
def test_a_running_sequence_holds_only_its_last_window(tokenizer: Tokenizer, window: int) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=200, layers=[GLOBAL, window_of(window)]))
    bench.add(numbers(5000))
    most = 0
    while bench.scheduler.running or bench.scheduler.waiting:
        bench.step()
        most = max(most, bench.cache.memory.packed[1].held)
    assert most <= -(-window // BLOCK_TOKENS) + 1
    assert_all_free(bench.cache)


@pytest.mark.parametrize("layers", [[GLOBAL, window_of(100)], [window_of(100)]], ids=str)
def test_a_match_is_the_deepest_one_whose_windows_are_there(
    tokenizer: Tokenizer, layers: list[object]
) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=300, layers=layers))  # type: ignore[arg-type]
    prompt = blocks(40)
    bench.add([*prompt, 1])
    bench.finish()
    cache = bench.cache
    windows = cache.memory.packed[-1]
    assert matched(bench, [*prompt, 2]) == 40 * BLOCK_TOKENS
    # Without the last block's window page, the end of the last extent is the next best.
    keys = bench.sequence([*prompt, 2])
    keys.blocks.extend_keys()
    forget(cache, len(cache.memory.packed) - 1, keys, [39])
    assert matched(bench, [*prompt, 2]) == 39 * BLOCK_TOKENS
    forget(cache, len(cache.memory.packed) - 1, keys, [b for b in range(32, 40)])
    assert matched(bench, [*prompt, 2]) == 32 * BLOCK_TOKENS
    forget(cache, len(cache.memory.packed) - 1, keys, [31])
    assert matched(bench, [*prompt, 2]) == 31 * BLOCK_TOKENS
    forget(cache, len(cache.memory.packed) - 1, keys, range(16, 32))  # type: ignore[arg-type]
    assert matched(bench, [*prompt, 2]) == 16 * BLOCK_TOKENS
    assert windows.held == 0


def forget(cache: KVCacheManager, group: int, sequence: Sequence, indices: list[int]) -> None:
    pool = cache.memory.packed[group]
    pages = [pool.lookup(sequence.blocks.key(block)) for block in indices]
    pool.forget([page for page in pages if page is not None])


@settings(max_examples=40, deadline=None)
@given(
    windows=st.lists(st.sampled_from([1, 64, 65, 150, 400]), min_size=1, max_size=2),
    with_global=st.booleans(),
    lost=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 19)), max_size=12),
)
def test_a_match_equals_a_search_of_all_depths(
    tokenizer: Tokenizer, windows: list[int], with_global: bool, lost: list[tuple[int, int]]
) -> None:
    layers = [GLOBAL] * with_global + [window_of(window) for window in windows]
    bench = Bench(tokenizer, bare_cache(blocks=300, layers=layers))
    cache = bench.cache
    prompt = [*blocks(20), 1]
    bench.add(prompt)
    bench.finish()
    sequence = bench.sequence(prompt)
    sequence.blocks.extend_keys()
    for group, block in lost:
        if group < len(cache.memory.groups):
            forget(cache, group, sequence, [block])

    def possible(depth: int) -> bool:
        return all(
            pool.lookup(sequence.blocks.key(block)) is not None
            for group, pool in zip(cache.memory.groups, cache.memory.packed, strict=True)
            for block in range(PLAIN.first_needed(group.window, depth), depth)
        )

    best = max(depth for depth in range(21) if possible(depth))
    assert matched(bench, prompt) == best * BLOCK_TOKENS


def test_superseded_window_pages_leave_before_checkpoints(tokenizer: Tokenizer) -> None:
    layers = [GLOBAL, window_of(64)]
    bench = Bench(tokenizer, bare_cache(blocks=120, layers=layers))
    cache = bench.cache
    prompt = [*blocks(2 * EXTENT_BLOCKS + 4), 1]
    bench.add(prompt)
    bench.finish()
    sequence = bench.sequence(prompt)
    sequence.blocks.extend_keys()
    windows = cache.memory.packed[1]

    def present(block: int) -> bool:
        return windows.lookup(sequence.blocks.key(block)) is not None

    at_checkpoints = [EXTENT_BLOCKS - 1, 2 * EXTENT_BLOCKS - 1]
    between = [5, EXTENT_BLOCKS + 5]
    assert all(present(block) for block in at_checkpoints + between)
    superseded = 2 * EXTENT_BLOCKS + 4 - len(at_checkpoints) - 1
    free = windows.capacity - (2 * EXTENT_BLOCKS + 4)
    windows.release(windows.allocate(free + superseded - 3))
    assert all(present(block) for block in at_checkpoints)
    assert not any(present(block) for block in between)


# -- admission --------------------------------------------------------------------------------


def test_a_block_that_another_computes_is_waited_for(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=50), batch_tokens=150)
    first, second = bench.add(numbers(300)), bench.add(numbers(300))
    bench.step()
    assert second.state is SequenceState.WAITING
    assert bench.cache.computed_by(second.blocks) is first.blocks
    bench.scheduler.remove(first)  # cancelled: the second takes over where it stood
    bench.finish()
    assert second.cached_tokens == 128 and second.computed_tokens == 300 - 128
    assert_all_free(bench.cache)


def test_a_prompt_waits_until_all_of_it_has_room(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=10), batch_tokens=512)
    first = bench.add(numbers(400), max_tokens=20)
    second = bench.add(numbers(500, 1000))
    bench.step()
    assert first.state is SequenceState.RUNNING and second.state is SequenceState.WAITING
    bench.finish()
    assert second.preemptions == 0


def test_a_waiting_prompt_is_not_looked_up_again_for_nothing(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=10), batch_tokens=512)
    bench.add(numbers(400), max_tokens=100)
    second = bench.add(numbers(500, 1000))
    bench.step()
    refused_at = second.blocks.refused_at
    assert refused_at is not None
    bench.step()
    assert second.blocks.refused_at == refused_at


# -- prefixes ---------------------------------------------------------------------------------


def test_a_document_is_held_whole_when_it_is_computed(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=60, layers=[GLOBAL, window_of(64)]))
    bench.add(numbers(1000), max_tokens=0, document=("d", 1000))
    bench.finish()
    (prefix,) = bench.cache.prefixes._prefixes.values()
    assert prefix.blocks == 15 and prefix.users == 0
    assert [pool.held for pool in bench.cache.memory.packed] == [15, 1]
    bench.cache.close_document("d")
    assert_all_free(bench.cache)


def test_blocks_of_a_closed_document_are_found_no_more(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=60))
    bench.add(numbers(1000), max_tokens=0, document=("d", 1000))
    bench.finish()
    assert matched(bench, numbers(1000)) == 960
    bench.cache.close_document("d")
    assert bench.cache.erase("d").blocks == 15
    assert matched(bench, numbers(1000)) == 0


def test_unused_prefixes_make_room_the_longest_unused_first(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=12))
    for index, name in enumerate("abc"):
        prompt = numbers(200, 1000 * index)
        bench.add(prompt, max_tokens=0, document=(name, 200))
        bench.finish()
    bench.add([*numbers(200), 1], document=("a", 200))  # used again
    bench.finish()
    bench.add(numbers(4 * BLOCK_TOKENS, 9000))
    bench.finish()
    names = [name[1][1] for name in bench.cache.prefixes._prefixes]  # type: ignore[index]
    assert names == ["c", "a"]


def test_a_prefix_in_use_stays(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=12), batch_tokens=512)
    bench.add(numbers(300), max_tokens=0, document=("d", 300))
    bench.finish()
    question = bench.add([*numbers(300), 1], max_tokens=40, document=("d", 300))
    bench.step()
    large = bench.add(numbers(600, 5000))
    bench.step()
    assert large.state is SequenceState.WAITING and question.state is SequenceState.RUNNING
    assert len(bench.cache.prefixes) == 1
    bench.finish()
    assert large.state is SequenceState.FINISHED


# -- small parts ------------------------------------------------------------------------------


def test_a_block_table_grows_and_keeps_its_entries() -> None:
    table = BlockTable()
    for index in range(100):
        table.append(index + 5, rows=64, first_position=64 * index)
    assert table.blocks == 100
    assert table.entries.tolist() == [[i + 5, 0, 64, 64 * i, 0] for i in range(100)]
    copy = table.fork()
    copy.append(1, rows=1, first_position=0)
    assert len(table.entries) == 100 and len(copy.entries) == 101


@given(
    base=st.lists(st.integers(0, 9), max_size=8),
    tail=st.lists(st.integers(0, 9), max_size=8),
    begin=st.integers(0, 16),
    length=st.integers(0, 16),
)
def test_token_ids_slice_as_one_list(
    base: list[int], tail: list[int], begin: int, length: int
) -> None:
    whole = base + tail
    tokens = TokenIds(np.array(base, dtype=np.int32), list(tail))
    end = min(begin + length, len(whole))
    begin = min(begin, end)
    assert tokens.slice(begin, end).tolist() == whole[begin:end]
    assert tokens.upto(end).tolist() == whole[:end]
    assert len(tokens) == len(whole)


def test_a_fork_of_token_ids_goes_its_own_way() -> None:
    tokens = TokenIds(np.array([1, 2], dtype=np.int32), [3])
    fork = tokens.fork()
    fork.append(4)
    assert len(tokens) == 3 and fork.slice(0, 4).tolist() == [1, 2, 3, 4]

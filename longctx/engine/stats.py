"""Parts of an engine's statistics: requests as they end, the device as a tier, and time."""

import operator
import time

from longctx.engine_stats import GroupStats, StepPart
from longctx.kv.cache_manager import KVCacheManager
from longctx.kv.memory import KVMemory
from longctx.request import SOURCES, FinishReason, TokenSource, Usage
from offload.stats import TierStats


class EndedRequests:
    """Counts requests by how they ended, and the tokens of their prompts and answers."""

    def __init__(self) -> None:
        self.by_reason = dict.fromkeys(FinishReason, 0)
        self.by_source: dict[TokenSource, int] = dict.fromkeys(SOURCES, 0)
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0

    def count(self, reason: FinishReason, usage: Usage) -> None:
        self.by_reason[reason] += 1
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.generated_tokens += usage.completion_tokens
        for source, tokens in usage.tokens_by_source.items():
            self.by_source[source] += tokens


class StepSeconds:
    """Adds up the seconds of steps by part, each from one call of `lap` to the next."""

    def __init__(self) -> None:
        self.totals: dict[StepPart, float] = {}
        self._last = time.perf_counter()

    def begin(self) -> None:
        """Let the next part begin now: nobody is charged for the time until here."""
        self._last = time.perf_counter()

    def lap(self, part: StepPart) -> None:
        """Charge a part with the time since the last call."""
        now = time.perf_counter()
        self.totals[part] = self.totals.get(part, 0.0) + now - self._last
        self._last = now

    def move(self, part: StepPart, to: StepPart, seconds: float) -> None:
        """Charge `to` with seconds that `part` was charged with."""
        if seconds:
            self.totals[part] = self.totals.get(part, 0.0) - seconds
            self.totals[to] = self.totals.get(to, 0.0) + seconds


def group_stats(memory: KVMemory) -> tuple[GroupStats, ...]:
    """Return how full the pools of packed blocks are, by layer group.

    The reserved blocks of the first group are neither in use nor room: no sequence gets them.
    """
    reserved = [memory.reserved_blocks] + [0] * (len(memory.packed) - 1)
    return tuple(
        GroupStats(capacity_blocks=pool.capacity - kept, blocks_in_use=pool.held - kept)
        for pool, kept in zip(memory.packed, reserved, strict=True)
    )


def device_stats(cache: KVCacheManager) -> TierStats:
    """Return what the device's pools of packed blocks hold, as a tier like those below it."""
    pools, groups = cache.memory.packed, group_stats(cache.memory)
    block_bytes = [sum(pool.page_bytes) for pool in pools]
    in_use = [group.blocks_in_use for group in groups]
    room = [group.capacity_blocks for group in groups]
    held = [blocks + pool.cached for pool, blocks in zip(pools, in_use, strict=True)]
    return TierStats(
        held_bytes=sum(map(operator.mul, held, block_bytes)),
        capacity_bytes=sum(map(operator.mul, room, block_bytes)),
        blocks=sum(held),
        blocks_in_use=sum(in_use),
        hits=cache.hits,
        misses=cache.misses,
        evictions={"cap": sum(pool.evicted for pool in pools)},
    )

"""The engine's figures by flat names: gauges, and counters, which end in `_total`."""

import operator
from collections import Counter

from longctx.engine.scheduler import Scheduler
from longctx.kv.cache_manager import KVCacheManager
from longctx.request import FinishReason, Usage


class Figures:
    """What is counted as requests end; the rest is asked of those who know it."""

    def __init__(self) -> None:
        self._totals: Counter[str] = Counter()
        for reason in FinishReason:
            self._totals[f"requests_{reason.value}_total"] = 0
        for kind in ("prompt", "cached", "generated"):
            self._totals[f"{kind}_tokens_total"] = 0

    def finished(self, reason: FinishReason, usage: Usage) -> None:
        """One request has come to its end."""
        self._totals[f"requests_{reason.value}_total"] += 1
        self._totals["prompt_tokens_total"] += usage.prompt_tokens
        self._totals["cached_tokens_total"] += usage.cached_tokens
        self._totals["generated_tokens_total"] += usage.completion_tokens

    def read(self, scheduler: Scheduler, cache: KVCacheManager) -> dict[str, float]:
        memory = cache.memory
        # Pages that no sequence gets are neither held nor room.
        reserved = [memory.reserved_blocks] + [0] * (len(memory.packed) - 1)
        held = [pool.held - kept for pool, kept in zip(memory.packed, reserved, strict=True)]
        room = [pool.capacity - kept for pool, kept in zip(memory.packed, reserved, strict=True)]
        full = [blocks + pool.cached for pool, blocks in zip(memory.packed, held, strict=True)]
        sizes = [sum(pool.page_bytes) for pool in memory.packed]
        numbers: dict[str, float] = {
            "requests_running": len(scheduler.running),
            "requests_waiting": len(scheduler.waiting),
            "preemptions_total": scheduler.preemptions,
            **self._totals,
            "prefixes_held": len(cache.prefixes),
            "raw_blocks_held": memory.raw.held,
            "device_hits_total": cache.hits,
            "device_misses_total": cache.misses,
            "device_evictions_cap_total": sum(pool.evicted for pool in memory.packed),
            "device_blocks": sum(full),
            "device_blocks_held": sum(held),
            "device_bytes": sum(map(operator.mul, full, sizes)),
            "device_capacity_bytes": sum(map(operator.mul, room, sizes)),
        }
        for index in range(len(memory.packed)):
            numbers[f"group{index}_capacity_blocks"] = room[index]
            numbers[f"group{index}_blocks_held"] = held[index]
        if cache.offloader is not None:
            numbers |= cache.offloader.store.stats()
        return numbers

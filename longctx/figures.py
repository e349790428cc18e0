"""The engine's figures by flat names: gauges, and counters, which end in `_total`."""

from collections import Counter

from longctx.kv_cache import KVCacheManager
from longctx.request import FinishReason, Usage
from longctx.scheduler import Scheduler


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
            "device_blocks": sum(pool.held + pool.cached for pool in memory.packed),
            "device_blocks_held": sum(pool.held for pool in memory.packed),
            "device_bytes": sum(
                (pool.held + pool.cached) * sum(pool.page_bytes) for pool in memory.packed
            ),
            "device_capacity_bytes": sum(
                pool.capacity * sum(pool.page_bytes) for pool in memory.packed
            ),
        }
        for index, pool in enumerate(memory.packed):
            numbers[f"group{index}_capacity_blocks"] = pool.capacity
            numbers[f"group{index}_blocks_held"] = pool.held
        if cache.tiers is not None:
            numbers |= cache.tiers.store.stats()
        return numbers

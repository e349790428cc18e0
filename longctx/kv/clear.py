"""Evicts, on request, what is cached and idle."""

import operator
from collections.abc import Iterable

from longctx.errors import InvalidRequest
from longctx.kv.cache_manager import KVCacheManager
from offload.stats import Cleared
from offload.store import KVStore


def clear_tiers(
    cache: KVCacheManager, store: KVStore | None, tiers: Iterable[str]
) -> dict[str, Cleared]:
    """Evict what is idle in `device` or `host`; return how much that was, by tier.

    Raises InvalidRequest for a tier that there is not.
    """
    cleared: dict[str, Cleared] = {}
    for tier in tiers:
        if tier == "device":
            blocks = cache.clear()
            sizes = [sum(pool.page_bytes) for pool in cache.memory.packed]
            cleared[tier] = Cleared(sum(blocks), sum(map(operator.mul, blocks, sizes)))
        elif store is not None and tier in store.memory_tiers:
            cleared[tier] = store.clear(tier)
        else:
            raise InvalidRequest(
                f"there is no {tier} tier; --host-pool-gib makes one in RAM", param="tier"
            )
    return cleared

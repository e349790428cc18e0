"""Evicts, on request, what is cached and idle."""

import operator
from collections.abc import Iterable

from longctx.errors import InvalidRequest
from longctx.kv.cache_manager import KVCacheManager
from offload.store import KVStore


def clear_tiers(
    cache: KVCacheManager, store: KVStore | None, tiers: Iterable[str]
) -> dict[str, float]:
    """Evict what is idle in `device` or `host`; return how many blocks and bytes that were.

    Raises InvalidRequest for a tier that there is not.
    """
    freed: dict[str, float] = {}
    for tier in tiers:
        if tier == "device":
            blocks = cache.clear()
            sizes = [sum(pool.page_bytes) for pool in cache.memory.packed]
            freed["device_blocks"] = sum(blocks)
            freed["device_bytes"] = sum(map(operator.mul, blocks, sizes))
        elif store is not None and tier in store.memory_tiers:
            cleared = store.clear(tier)
            freed[f"{tier}_blocks"], freed[f"{tier}_bytes"] = cleared.blocks, cleared.num_bytes
        else:
            raise InvalidRequest(
                f"there is no {tier} tier; --host-pool-gib makes one in RAM", param="tier"
            )
    return freed

"""Where a module is: for those who keep schemas."""

from collections.abc import Iterable

from longctx.engine.ingestion import Ingestion
from longctx.engine.modules import Module, Modules
from longctx.kv.cache_manager import KVCacheManager
from longctx.request import ModuleState
from offload.key import BlockKey
from offload.store import KVStore
from offload.tier_names import TIERS

BEST_FIRST = (*TIERS, "none")


def module_states(
    modules: Modules,
    module_ids: Iterable[str],
    cache: KVCacheManager,
    store: KVStore | None,
    ingestion: Ingestion | None,
) -> dict[str, ModuleState]:
    """Of those that are open."""
    states = {}
    for module_id in module_ids:
        module = modules.find(module_id)
        if module is not None:
            durable = 0 if ingestion is None else ingestion.durable_tokens(module_id)
            states[module_id] = _state(module, cache, store, durable)
    return states


def _state(
    module: Module, cache: KVCacheManager, store: KVStore | None, durable_tokens: int
) -> ModuleState:
    """Of the tenants that use it, the one that has it in the best tier counts."""
    keys = [chain.keys for chain in module.chains.values() if chain.tokens == len(module.token_ids)]
    tiers = [_tier(own, cache, store) for own in keys] or ["none"]
    blocks = module.layout.runs[-1].block
    pools = cache.memory.packed
    block_bytes = cache.memory.block_bytes or sum(sum(pool.page_bytes) for pool in pools)
    return ModuleState(
        tokens=len(module.token_ids),
        blocks=blocks,
        kv_bytes=blocks * block_bytes,
        tier=min(tiers, key=BEST_FIRST.index),
        hits=module.hits,
        durable_tokens=durable_tokens,
    )


def _tier(keys: tuple[BlockKey, ...], cache: KVCacheManager, store: KVStore | None) -> str:
    if all(cache.memory.packed[0].lookup(key) is not None for key in keys):
        return "device"
    if store is None:
        return "none"
    places = {store.tier_of(0, key) for key in keys}
    if None in places:
        return "none"
    return max((place for place in places if place is not None), key=TIERS.index)

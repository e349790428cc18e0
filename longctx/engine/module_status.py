"""Says in which tier modules are, for the server that keeps schemas."""

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
    """Return the states of those modules that are open, by id."""
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
    """Return a module's state; of its tenants, the one that has it in the best tier counts."""
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
    """Return the slowest of the tiers that have the blocks, "none" where one is in none."""
    if all(cache.memory.packed[0].lookup(key) is not None for key in keys):
        return "device"
    if store is None:
        return "none"
    tiers = {store.tier_of(0, key) for key in keys}
    if None in tiers:
        return "none"
    return max((tier for tier in tiers if tier is not None), key=TIERS.index)

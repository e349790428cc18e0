"""Says in which tier modules and documents are, for the server that keeps them."""

from collections.abc import Iterable

from longctx.engine.ingestion import Ingestion
from longctx.engine.modules import Module, Modules
from longctx.kv.cache_manager import KVCacheManager
from longctx.kv.prefix_index import PrefixIndex, document_name, owner_of
from longctx.request import ModuleState
from offload.key import BlockKey
from offload.store import KVStore
from offload.tier_names import TIERS, TierName

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


def document_tiers(prefixes: PrefixIndex, store: KVStore | None) -> dict[str, TierName]:
    """Return the fastest tier that has each document, those that none has left out.

    The device has a document that it holds whole. A tier below evicts a chain from its end, so one
    that has the last block is taken to have them all: this is asked often, and documents are long.
    """
    tiers: dict[str, TierName] = {}
    for name in prefixes.names():
        owner = owner_of(name)
        alone = not any(part[:1] == ("document",) for part in name[:-1])
        if not (alone and name[-1] == document_name(owner)):
            continue  # a module's, or what stands after another document
        keys = prefixes.known_keys(name)
        tier: TierName | None = None
        if name in prefixes:
            tier = "device"
        elif store is not None and keys:
            tier = store.tier_of(0, keys[-1])
        if tier is not None:
            tiers[owner] = min(tier, tiers.get(owner, tier), key=TIERS.index)
    return tiers


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

"""How the leader's parts of an engine are put together, over many ranks."""

from compress.shape import BLOCK_TOKENS
from longctx.config import CacheConfig, SchedulerConfig
from longctx.engine.cost_model import CostModel
from longctx.engine.parts import EngineParts, assemble, step_blocks
from longctx.engine_info import CodecChoice
from longctx.kv.cache_manager import KVCacheManager
from longctx.kv.memory import pool_bytes
from longctx.kv.offloading import KVOffloader
from longctx.kv.open_store import open_store
from longctx.model.loader import LoadedModel
from longctx.ring.leader_memory import LeaderMemory
from longctx.ring.pages import LocalPages, RingExtents, RingTransfer
from longctx.ring.rank import RingMemorySpec
from longctx.ring.ranks import Ranks
from longctx.ring.runner import RingRunner
from longctx.text.tokenizer import Tokenizer


def many_rank_parts(
    model: LoadedModel,
    tokenizer: Tokenizer,
    ranks: Ranks,
    *,
    codec: CodecChoice,
    backend: str,
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    cost: CostModel,
) -> EngineParts:
    """Open the other ranks and return the leader's parts, as `one_rank_parts` does for one rank.

    `codec` and `backend` are those chosen for all ranks. There is no streaming and no relocation.
    Raises ModelRefused where a rank has other weights or no block fits, PeerLost where one is lost.
    """
    spec = model.spec
    batch_tokens = scheduler.batch_tokens(spec.device.type, ranks=ranks.size)
    ring = RingMemorySpec.of(
        spec,
        ranks=ranks.size,
        codec=codec.codec,
        backend=backend,
        pool_bytes=pool_bytes(cache.device_pool_gib, spec.device, ranks=ranks.size),
        step_blocks=step_blocks(scheduler, batch_tokens),
        batch_blocks=batch_tokens // BLOCK_TOKENS,
    )
    memory = LeaderMemory(spec, ring)
    runner = RingRunner(model, memory, ranks)
    pages = [LocalPages(memory), *map(ranks.pages, range(1, ranks.size))]
    store = open_store(cache, memory, extents=RingExtents(memory, pages))
    offloader = None
    if store is not None:
        transfers = [
            RingTransfer(group, sum(pool.page_bytes)) for group, pool in enumerate(memory.packed)
        ]
        offloader = KVOffloader(memory, store, staged=False, transfers=transfers)
    manager = KVCacheManager(memory, offloader)
    return assemble(
        model,
        tokenizer,
        runner,
        manager,
        codec=codec,
        backend=backend,
        scheduler=scheduler,
        batch_tokens=batch_tokens,
        cost=cost,
    )

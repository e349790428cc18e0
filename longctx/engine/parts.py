"""What an engine computes with: memory, tiers and runner, on one rank or on many."""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from compress.shape import BLOCK_TOKENS
from longctx.attention.registry import BACKENDS
from longctx.attention.rotated import RotatedAttention
from longctx.attention.streamed import StreamedAttention
from longctx.config import EngineConfig, SchedulerConfig
from longctx.engine.model_runner import ModelRunner
from longctx.engine.scheduler import Chunk
from longctx.kv.cache_manager import KVCacheManager
from longctx.kv.memory import KVMemory, pool_bytes
from longctx.kv.offloading import Migration
from longctx.kv.open_store import open_store
from longctx.model.loader import LoadedModel
from longctx.ring.leader_memory import LeaderMemory
from longctx.ring.pages import LocalPages, RingExtents, RingTransfer
from longctx.ring.rank import RingMemorySpec
from longctx.ring.ranks import Ranks
from longctx.ring.runner import RingRunner
from offload.store import KVStore

STAGING_BLOCKS = 64  # of the device's, at most an eighth of them, where absent blocks pass through


class Runner(Protocol):
    """Computes chunks whose pages have been allocated."""

    @property
    def computed_tokens(self) -> int: ...

    def run_chunks(self, chunks: Items[Chunk]) -> Tensor:
        """Logits [drawing chunks, vocab], float32. The chunks' KV is in the pools afterwards."""
        ...

    def stats(self) -> dict[str, float]:
        """As `Engine.stats`."""
        ...


@dataclass(frozen=True, slots=True)
class Machine:
    memory: KVMemory
    store: KVStore | None
    migration: Migration | None
    cache: KVCacheManager
    runner: Runner
    batch_tokens: int

    @classmethod
    def alone(
        cls, config: EngineConfig, model: LoadedModel, *, codec: str, backend: str
    ) -> "Machine":
        """`codec` and `backend` as they were settled."""
        spec = model.spec
        batch_tokens = config.scheduler.batch_tokens(spec.device.type)
        memory = KVMemory(
            spec.layers,
            dtype=spec.dtype,
            device=spec.device,
            codec=codec,
            pool_bytes=pool_bytes(config.cache.device_pool_gib, spec.device),
            step_blocks=_step_blocks(config.scheduler, batch_tokens),
        )
        store = open_store(config.cache, memory)
        migration = None
        if store is not None:
            migration = Migration(memory, store, staged=spec.device.type != "cpu")
        cache = KVCacheManager(memory, migration)
        attention = BACKENDS[backend](memory)
        if migration is not None and cache.can_stream:
            staging = memory.reserve(STAGING_BLOCKS)
            attention = StreamedAttention(attention, memory, staging, migration.read_layer)
        if spec.relocation.shiftable:
            attention = RotatedAttention(attention, memory, spec.relocation.rotations)
        runner = ModelRunner(model, memory, attention)
        return cls(memory, store, migration, cache, runner, batch_tokens)

    @classmethod
    def over_ranks(
        cls, config: EngineConfig, model: LoadedModel, ranks: Ranks, *, codec: str, backend: str
    ) -> "Machine":
        """The same with other ranks, which are told what they need."""
        spec = model.spec
        batch_tokens = config.scheduler.batch_tokens(spec.device.type, ranks=ranks.size)
        ring = RingMemorySpec.of(
            spec,
            ranks=ranks.size,
            codec=codec,
            backend=backend,
            pool_bytes=pool_bytes(config.cache.device_pool_gib, spec.device, ranks=ranks.size),
            step_blocks=_step_blocks(config.scheduler, batch_tokens),
            batch_blocks=batch_tokens // BLOCK_TOKENS,
        )
        memory = LeaderMemory(spec, ring)
        runner = RingRunner(model, memory, ranks)
        pages = [LocalPages(memory), *map(ranks.pages, range(1, ranks.size))]
        store = open_store(config.cache, memory, extents=RingExtents(memory, pages))
        migration = None
        if store is not None:
            transfers = [
                RingTransfer(group, sum(pool.page_bytes))
                for group, pool in enumerate(memory.packed)
            ]
            migration = Migration(memory, store, staged=False, transfers=transfers)
        cache = KVCacheManager(memory, migration)
        return cls(memory, store, migration, cache, runner, batch_tokens)


def _step_blocks(scheduler: SchedulerConfig, batch_tokens: int) -> int:
    """Blocks that grow in one step, at most."""
    return batch_tokens // BLOCK_TOKENS + 1 + 2 * scheduler.max_sequences

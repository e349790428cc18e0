"""Names the parts that an engine is made of, and puts them together on one rank.

`longctx/open_engine.py` loads and chooses what they need (model, codec, backend). With many ranks
`longctx/ring/parts.py` puts them together.
"""

from dataclasses import dataclass

from compress.shape import BLOCK_TOKENS
from longctx.attention.backend import AttentionBackend
from longctx.attention.registry import BACKENDS
from longctx.attention.rotated import RotatedAttention
from longctx.attention.streamed import StreamedAttention
from longctx.config import CacheConfig, SchedulerConfig
from longctx.engine.cost_model import CostModel
from longctx.engine.info import engine_info
from longctx.engine.model_runner import ModelRunner, Runner
from longctx.engine.scheduler import Scheduler
from longctx.engine_info import CodecChoice, EngineInfo
from longctx.kv.cache_manager import KVCacheManager
from longctx.kv.memory import SCRATCH_BYTES, KVMemory, pool_bytes, raw_pool_bytes, raw_token_bytes
from longctx.kv.offloading import KVOffloader
from longctx.kv.open_store import open_store
from longctx.model.loader import LoadedModel
from longctx.text.tokenizer import Tokenizer
from offload.store import KVStore

# Blocks of the device, at most an eighth of them, through which absent blocks are streamed.
SCORED_LOGITS = 16 << 20  # numbers, of the rows that one step scores
STAGING_BLOCKS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """Everything that an `Engine` is given. Benchmarks and tests may replace a part.

    A runner that wraps this one sees every batch:
    `Engine(replace(parts, runner=Recording(parts.runner)))`.
    """

    model: LoadedModel
    tokenizer: Tokenizer
    info: EngineInfo
    memory: KVMemory
    store: KVStore | None  # None where nothing is kept below the device
    offloader: KVOffloader | None  # the engine's side of the store
    cache: KVCacheManager
    scheduler: Scheduler
    runner: Runner


def one_rank_parts(
    model: LoadedModel,
    tokenizer: Tokenizer,
    *,
    codec: CodecChoice,
    backend: str,
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    cost: CostModel,
) -> EngineParts:
    """Make the parts of an engine that computes alone, with a codec and a backend chosen before."""
    spec = model.spec
    token_bytes = raw_token_bytes(spec.layers, spec.dtype)
    batch_tokens = scheduler.batch_tokens(spec.device.type, token_bytes=token_bytes)
    growing = step_blocks(scheduler, batch_tokens)
    beside_bytes = raw_pool_bytes(spec.layers, spec.dtype, growing) + SCRATCH_BYTES
    memory = KVMemory(
        spec.layers,
        dtype=spec.dtype,
        device=spec.device,
        codec=codec.codec,
        pool_bytes=pool_bytes(cache.device_pool_gib, spec.device, beside_bytes=beside_bytes),
        step_blocks=growing,
    )
    store = open_store(cache, memory)
    offloader = None
    if store is not None:
        offloader = KVOffloader(memory, store, staged=spec.device.type != "cpu")
    manager = KVCacheManager(memory, offloader)
    attention: AttentionBackend = BACKENDS[backend](memory)
    if offloader is not None and manager.can_stream:
        staging = memory.reserve(STAGING_BLOCKS)
        attention = StreamedAttention(attention, memory, staging, offloader.read_layer)
    if spec.relocation.shiftable:
        attention = RotatedAttention(attention, memory, spec.relocation.rotations)
    return assemble(
        model,
        tokenizer,
        ModelRunner(model, memory, attention),
        manager,
        codec=codec,
        backend=backend,
        scheduler=scheduler,
        batch_tokens=batch_tokens,
        cost=cost,
    )


def assemble(
    model: LoadedModel,
    tokenizer: Tokenizer,
    runner: Runner,
    cache: KVCacheManager,
    *,
    codec: CodecChoice,
    backend: str,
    scheduler: SchedulerConfig,
    batch_tokens: int,
    cost: CostModel,
) -> EngineParts:
    """Add to a runner and a cache what is the same for one rank and for many."""
    offloader = cache.offloader
    store = None if offloader is None else offloader.store
    return EngineParts(
        model=model,
        tokenizer=tokenizer,
        info=engine_info(
            model.spec, cache.memory, codec, store, backend=backend, tokenizer=tokenizer
        ),
        memory=cache.memory,
        store=store,
        offloader=offloader,
        cache=cache,
        scheduler=Scheduler(
            scheduler,
            cache,
            batch_tokens=batch_tokens,
            scored_tokens=max(BLOCK_TOKENS, SCORED_LOGITS // model.spec.vocab_size),
            target_seconds=scheduler.target_seconds(model.spec.device.type),
            cost=cost,
        ),
        runner=runner,
    )


def step_blocks(scheduler: SchedulerConfig, batch_tokens: int) -> int:
    """Return the largest number of blocks that can be open or fill up in one step.

    A batch of T tokens touches at most T / 64 full blocks and one begun before; each sequence may
    add a block where it begins and one where it ends. With 512 tokens and 8 sequences that is
    512 / 64 + 1 + 2 * 8 = 25 blocks.
    """
    return batch_tokens // BLOCK_TOKENS + 1 + 2 * scheduler.max_sequences

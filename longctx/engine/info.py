"""Makes the plain data that an engine says of itself (`EngineInfo`) from its memory and tiers."""

import hashlib

from compress.shape import BLOCK_TOKENS
from longctx.engine_info import CodecChoice, ContextLimits, EngineInfo
from longctx.kv.memory import KVMemory
from longctx.model.spec import ModelSpec
from longctx.text.tokenizer import Tokenizer
from offload.store import KVStore
from offload.tier_names import TIERS


def context_limits(
    max_context_tokens: int, memory: KVMemory, *, below_tokens: int = 0
) -> ContextLimits:
    """Return how long prompts and answers may be: what the model allows and memory can hold.

    `below_tokens` is what the largest tier below the device holds. Nothing is streamed through a
    device that does not hold the blocks of one step.
    """
    capacity = held = memory.capacity_tokens
    if memory.can_stream and memory.capacity_blocks >= memory.step_blocks:
        held = max(capacity, below_tokens)
    return ContextLimits(
        max_context_tokens=max_context_tokens,
        capacity_tokens=capacity,
        longest_tokens=min(max_context_tokens, held),
        streamed_answer_tokens=max(0, capacity - memory.step_blocks * BLOCK_TOKENS),
    )


def engine_info(
    spec: ModelSpec,
    memory: KVMemory,
    codec: CodecChoice,
    store: KVStore | None,
    *,
    backend: str,
    tokenizer: Tokenizer,
) -> EngineInfo:
    """Describe an engine that is about to serve, and its tiers as they are now."""
    identity = f"{spec.fingerprint} {tokenizer.fingerprint}".encode()
    stored = {} if store is None else store.stats().tiers
    capacity_bytes = {tier: stats.capacity_bytes or 0 for tier, stats in stored.items()}
    capacity_tokens = {tier: memory.tokens_in(capacity_bytes.get(tier, 0)) for tier in TIERS}
    limits = context_limits(spec.max_context, memory, below_tokens=max(capacity_tokens.values()))
    return EngineInfo(
        model_name=spec.name,
        fingerprint=hashlib.sha256(identity).hexdigest(),
        limits=limits,
        tier_capacity_tokens=capacity_tokens | {"device": limits.capacity_tokens},
        disk_capacity_bytes=capacity_bytes.get("disk", 0),
        disk_bytes=stored["disk"].held_bytes if "disk" in stored else 0,
        block_tokens=BLOCK_TOKENS,
        kv_block_bytes=memory.block_bytes,
        kv_window_bytes=memory.window_bytes,
        kv_codec=codec.codec,
        codec_choice=codec,
        device=str(spec.device),
        dtype=str(spec.dtype).removeprefix("torch."),
        dtype_reason=None,
        backend=backend,
        vocab_size=spec.vocab_size,
        shiftable=spec.relocation.shiftable,
        shiftable_reason=spec.relocation.reason,
    )

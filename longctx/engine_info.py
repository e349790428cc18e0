"""What a loaded engine says of itself."""

from dataclasses import dataclass

from compress.shape import BLOCK_TOKENS
from longctx.config import KVCodec
from longctx.kv.memory import KVMemory
from longctx.limits import ContextLimits
from longctx.model.spec import ModelSpec
from longctx.quality.gate import CodecChoice
from offload.store import KVStore
from offload.tier_names import TIERS, TierName


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    model_name: str
    fingerprint: str
    limits: ContextLimits
    tier_capacity_tokens: dict[TierName, int]  # about so many fit; 0 where there is no such tier
    disk_capacity_bytes: int
    disk_bytes: int  # stored there when the engine started, of any model
    block_tokens: int
    kv_block_bytes: int  # one block in all layers that see everything
    kv_window_bytes: int  # what the layers with windows hold of a finished prompt
    kv_codec: KVCodec
    codec_choice: CodecChoice  # why that one
    device: str
    dtype: str
    backend: str
    vocab_size: int
    shiftable: bool  # cached keys may serve at other positions than they were encoded at
    shiftable_reason: str

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        memory: KVMemory,
        codec: CodecChoice,
        store: KVStore | None,
        *,
        backend: str,
    ) -> "EngineInfo":
        stored = {} if store is None else store.stats()
        capacity_tokens = {
            tier: memory.tokens_in(int(stored.get(f"{tier}_capacity_bytes", 0))) for tier in TIERS
        }
        limits = ContextLimits.of(
            spec.max_context, memory, below_tokens=max(capacity_tokens.values())
        )
        return cls(
            model_name=spec.name,
            fingerprint=spec.fingerprint,
            limits=limits,
            tier_capacity_tokens=capacity_tokens | {"device": limits.capacity_tokens},
            disk_capacity_bytes=int(stored.get("disk_capacity_bytes", 0)),
            disk_bytes=int(stored.get("disk_bytes", 0)),
            block_tokens=BLOCK_TOKENS,
            kv_block_bytes=memory.block_bytes,
            kv_window_bytes=memory.window_bytes,
            kv_codec=codec.codec,
            codec_choice=codec,
            device=str(spec.device),
            dtype=str(spec.dtype).removeprefix("torch."),
            backend=backend,
            vocab_size=spec.vocab_size,
            shiftable=spec.relocation.shiftable,
            shiftable_reason=spec.relocation.reason,
        )

    @property
    def max_context_tokens(self) -> int:
        return self.limits.max_context_tokens

    @property
    def capacity_tokens(self) -> int:
        """Tokens of KV that the device pool holds."""
        return self.limits.capacity_tokens

    def kv_bytes(self, tokens: int) -> int:
        """Device memory of a computed prompt of that many tokens; open blocks do not count."""
        blocks = tokens // self.block_tokens
        return blocks * self.kv_block_bytes + (self.kv_window_bytes if blocks else 0)

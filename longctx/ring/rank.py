"""One rank: its copy of the model, its pools, and the steps that the leader tells it."""

from dataclasses import dataclass

from longctx.kv_memory import KVMemory
from longctx.model import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RingMemory:
    """What the leader settles for all ranks: their pools are alike, page for page."""

    ranks: int
    codec: str
    backend: str
    pool_bytes: int  # of packed pages, on each rank
    step_blocks: int
    tile_blocks: int  # that travel at once
    own_blocks: int  # of one step, that a rank computes for others to keep

    def memory(self, spec: ModelSpec) -> KVMemory:
        """A rank's pools."""
        raise NotImplementedError

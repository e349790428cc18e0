"""What of one sequence's blocks is stored below the device, or on its way."""

from dataclasses import dataclass, field

from offload.block_run import Slots
from offload.key import BlockKey
from offload.tier_names import TierName


@dataclass(slots=True, eq=False)
class Load:
    """Blocks on their way up for one waiting sequence, and the pages that it pins meanwhile."""

    begin: int  # depth in blocks without them
    held: list[list[int]]  # per group: pages that it will need too and that are there already
    parts: list[tuple[int, tuple[BlockKey, ...], list[int], Slots]]  # group, keys, pages, slots
    parents: list[list[BlockKey]]  # per part: of each key
    sources: tuple[str, ...]  # of the prompt that waits, as in a `BlockRun`
    ended: bool = False  # or late: the sequence computes what is missing
    arrived: bool = field(default=False, init=False)  # no thread writes into the pages any more
    abandoned: bool = field(default=False, init=False)


@dataclass(slots=True, eq=False)
class OffloadState:
    """One sequence's dealings with the lower tiers, kept by `KVOffloader` and the cache manager."""

    load: Load | None = None  # while waiting: blocks on their way up
    loads: int = 0  # how often it has waited for some since it last ran
    # Blocks that loads brought for it, until it is admitted: the tier, first and last + 1.
    loaded: list[tuple[TierName, int, int]] = field(default_factory=list)
    module_prefills: int = 0  # how often something was computed for it to reuse
    streams: bool = False  # its context is larger than the device: old blocks go and are not held
    absent: int = 0  # blocks of global layers, from the first on, that have gone
    retries: int = 0  # how often absent blocks could not be read
    failure: str | None = None  # why the tiers cannot serve it, which ends it
    store_until: int = 0  # blocks that are worth storing
    stored: int = 0  # blocks that have been offered to the store
    stored_seconds: float = 0.0  # when the last of them was
    writing: int = 0  # runs of its blocks that are being written
    spilling: int = 0  # runs of copies of its blocks that are being written
    spilled_seconds: float = 0.0  # when they were offered
    window_budget: float = 0.0  # bytes that window checkpoints may still take in the store
    prefill_seconds: float = 0.0  # time of the steps that computed what is not offered yet

"""What tiers and the store say of themselves: plain data, which travels between processes as it is.

Counters grow from 0 for as long as a tier is open; everything else is as of now.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from offload.tier_names import TierName

EvictionReason = Literal["cap", "space", "ttl"]


class Cleared(NamedTuple):
    """Says what left a tier that was cleared: all of it, or of the device what was idle."""

    blocks: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Erased:
    """Says what a deletion took from each tier, and how many blocks could not be deleted."""

    tiers: Mapping[TierName, Cleared]
    left: int = 0


class Dropped(NamedTuple):
    """Says what of a deletion has left a tier, and how many blocks could not be deleted."""

    blocks: int
    num_bytes: int
    left: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStats:
    """Holds one tier's counters and gauges.

    A field is None, and a mapping is empty, where the tier has no such thing: only a disk has
    extents, a quarantine and incidents, and reads and writes are counted below the device alone.
    Blocks are counted once for each layer group.
    """

    held_bytes: int
    capacity_bytes: int | None  # None where there is no bound
    blocks: int
    blocks_in_use: int | None = None  # of `blocks`, those that may not be evicted now
    hits: int  # blocks that were looked for and found
    misses: int
    evictions: Mapping[EvictionReason, int]  # blocks, or files of a disk, that left for room or age

    read_bytes: int | None = None
    read_seconds: float | None = None
    write_bytes: int | None = None
    write_seconds: float | None = None

    extents: int | None = None  # files of blocks
    extents_written: int | None = None
    corrupt_files: int | None = None  # found so far, one for each file, however many pages
    quarantine_files: int | None = None  # corrupt ones that are kept to look at
    quarantine_bytes: int | None = None
    writes_off: bool | None = None  # nothing is written for a while after a failure
    incidents: Mapping[str, int] = field(default_factory=dict)  # by kind, beside corrupt files


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """Holds the counters and gauges of a `KVStore`, and of its tiers, the fastest first."""

    tiers: Mapping[TierName, TierStats]
    queued_bytes: int  # offered and not written yet
    loads_running: int
    loads_late: int  # given up for their time
    failures: int  # transfers that failed by a bug
    read_bytes_per_second: float  # of the lowest tier, as measured lately

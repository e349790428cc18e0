"""The tiers by name, in the order in which a block is looked for: the one place that lists them.

Figures, REST answers, traces and error messages use these names. `device` is the block pool, which
is no `Tier`: sequences are computed in it.
"""

from typing import Literal, get_args

MemoryTierName = Literal["device", "host"]  # gone with the process; can be emptied on request
TierName = Literal[MemoryTierName, "disk"]

MEMORY_TIERS: tuple[MemoryTierName, ...] = get_args(MemoryTierName)
TIERS: tuple[TierName, ...] = get_args(TierName)

"""Remembers where a prompt's blocks were when they were looked up: for requests that ask why."""

from dataclasses import dataclass, field

from longctx.request import CacheExplanation
from offload.tier_names import TierName


@dataclass(slots=True)
class LookupTrace:
    """Each full block's tier at the `first` and at the `last` lookup."""

    first: list[TierName | None] | None = None
    last: list[TierName | None] = field(default_factory=list)
    explanation: CacheExplanation | None = None

    def note(self, places: list[TierName | None]) -> None:
        """Note another lookup. What moved up to the device meanwhile was read for this prompt."""
        if self.first is None:
            self.first = self.last = places
            return
        self.last = [
            before if now == "device" and before is not None else now
            for before, now in zip(self.last, places, strict=True)
        ]

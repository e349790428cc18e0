"""Where the blocks of one prompt were when it was looked for: kept only if the request asks why."""

from dataclasses import dataclass, field

from longctx.request import CacheExplanation
from offload.tier_names import TierName


@dataclass(slots=True)
class LookupTrace:
    """`first` and `last`: for each full block, where it was at the first and the latest look."""

    first: list[TierName | None] | None = None
    last: list[TierName | None] = field(default_factory=list)
    explanation: CacheExplanation | None = None

    def note(self, places: list[TierName | None]) -> None:
        """Another look. What was read from a lower tier meanwhile was read for this prompt."""
        if self.first is None:
            self.first = self.last = places
            return
        self.last = [
            before if now == "device" and before is not None else now
            for before, now in zip(self.last, places, strict=True)
        ]

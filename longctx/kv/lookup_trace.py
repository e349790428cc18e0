"""Where the blocks of one prompt were when it was looked for: kept only if the request asks why."""

from dataclasses import dataclass, field
from typing import Literal

from longctx.request import CacheExplanation

Place = Literal["device", "host", "disk"]


@dataclass(slots=True)
class Trace:
    """`first` and `last`: for each full block, where it was at the first and the latest look."""

    first: list[Place | None] | None = None
    last: list[Place | None] = field(default_factory=list)
    explanation: CacheExplanation | None = None

    def note(self, places: list[Place | None]) -> None:
        """Another look. What was read from a lower tier meanwhile was read for this prompt."""
        if self.first is None:
            self.first = self.last = places
            return
        self.last = [
            before if before in ("host", "disk") and now == "device" else now
            for before, now in zip(self.last, places, strict=True)
        ]

"""What the leader has of the other ranks. Rank 0 is the leader itself."""

from collections.abc import Sequence
from typing import Protocol

from longctx.model.loader import LoadedModel
from longctx.ring.pages import RankPages
from longctx.ring.rank import RingMemory
from longctx.ring.step import RankStep
from longctx.ring.transport import Transport


class Ranks(Protocol):
    """Ranks 1 to `size - 1`, wherever they run: they compute what they are told, no more."""

    @property
    def size(self) -> int: ...

    @property
    def transport(self) -> Transport:
        """The leader's own end."""
        ...

    def open(self, memory: RingMemory, model: LoadedModel) -> None:
        """Let all ranks become a `Rank` with such pools, while the leader does so too.

        `model`: the leader's, for ranks that can share it.
        """
        ...

    def start(self, steps: Sequence[RankStep]) -> None:
        """Let each rank begin its step; `steps[0]`, the leader's own, is left to it."""
        ...

    def finish(self) -> None:
        """Wait until all are done. Raises PeerLost, with what a rank's step died of."""
        ...

    def pages(self, rank: int) -> RankPages:
        """For the tiers: the pages of a rank other than the leader."""
        ...

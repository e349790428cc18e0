"""What the leader, rank 0, knows of the other ranks."""

from collections.abc import Sequence
from typing import Protocol

from longctx.model.loader import LoadedModel
from longctx.ring.pages import RankPages
from longctx.ring.rank import RingMemorySpec
from longctx.ring.step import RankStep
from longctx.ring.transport import Transport


class Ranks(Protocol):
    """Ranks 1 to `size - 1`, the followers, wherever they run.

    The leader calls `open` once, then `start` and `finish` in turn for each step, all from its
    engine's thread; `pages` may be used at any time after `open`, from any thread.
    """

    @property
    def size(self) -> int:
        """How many ranks there are, the leader included."""
        ...

    @property
    def transport(self) -> Transport:
        """The leader's own end."""
        ...

    @property
    def sent_bytes(self) -> int:
        """What all ranks have sent to each other, each as of its last step; read between steps."""
        ...

    def open(self, memory: RingMemorySpec, model: LoadedModel) -> None:
        """Let each follower make a `Rank` with such pools; the leader makes its own meanwhile.

        `model`: the leader's, for ranks that can share it. Raises ModelRefused, PeerLost.
        """
        ...

    def start(self, steps: Sequence[RankStep]) -> None:
        """Let each follower begin its step; `steps[0]`, the leader's own, is left to the leader.

        Raises PeerLost.
        """
        ...

    def finish(self) -> None:
        """Wait until all followers have done their steps.

        Raises PeerLost, which names the rank and what its step failed with.
        """
        ...

    def pages(self, rank: int) -> RankPages:
        """Return the pages of a follower, for the offload tiers."""
        ...

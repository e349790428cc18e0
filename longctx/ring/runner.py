"""The leader's forward pass: it plans each rank's step, and all ranks run theirs at once."""

from collections.abc import Sequence as Items

from torch import Tensor

from longctx.engine.scheduler import Chunk
from longctx.engine_stats import RingStats
from longctx.errors import PeerLost
from longctx.model.loader import LoadedModel
from longctx.ring.leader_memory import LeaderMemory
from longctx.ring.plan import StepPlanner
from longctx.ring.rank import Rank
from longctx.ring.ranks import Ranks


class RingRunner:
    """A `Runner` over all ranks.

    The engine's thread constructs it and calls `run_chunks`, once per step. After PeerLost
    the ranks no longer agree on their pages: the runner cannot be used again.
    """

    def __init__(self, model: LoadedModel, memory: LeaderMemory, ranks: Ranks) -> None:
        """Open the ranks and measure the link between them.

        Raises ModelRefused where a rank has other weights, PeerLost where one is lost.
        """
        ranks.open(memory.ring, model)
        self.ranks = ranks
        self.rank = Rank(model, memory.ring, ranks.transport, memory)
        self.planner = StepPlanner(memory, model.spec, self.rank.link, self.rank.pairs_per_second)
        self.computed_tokens = 0
        self.seconds = None

    def run_chunks(self, chunks: Items[Chunk]) -> Tensor:
        """Return logits [sampled chunks, vocab], float32.

        Raises PeerLost where a rank is lost or its step fails: all ranks must start again.
        """
        steps = self.planner.plan(chunks)
        try:
            self.ranks.start(steps)
            logits = self.rank.run(steps[0])
        except PeerLost:
            raise
        except Exception as error:  # the followers wait for what the leader will not send
            raise PeerLost(f"{type(error).__name__}: {error}") from error
        self.ranks.finish()
        assert logits is not None, "the leader gets the logits"
        self.computed_tokens += sum(chunk.num_tokens for chunk in chunks)
        return logits

    def ring_stats(self) -> RingStats:
        return RingStats(
            sent_bytes=self.ranks.sent_bytes,
            wait_seconds=self.rank.wait_seconds,
            link_latency_seconds=self.rank.link.latency_seconds,
            link_bytes_per_second=self.rank.link.bytes_per_second,
        )

"""The same requests on one rank and on several, and how far apart their logits are."""

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from longctx.request import Request
from longctx.ring.link import Link
from longctx.ring.runner import RingRunner
from longctx.ring.virtual import VirtualRanks
from tests.support.recorded_engine import RecordedEngine, build_engine

# Only bytes count: the choice between pass-KV and pass-Q does not depend on the machine.
LINK = Link(latency_seconds=0.0, bytes_per_second=1e9)


def ringed_engine(folder: Path, ranks: int, **options: Any) -> RecordedEngine:
    """Build an engine over ranks that are threads; with one rank, the ordinary engine."""
    if ranks == 1:
        return build_engine(folder, **options)
    engine = build_engine(folder, ranks=VirtualRanks(ranks), **options)
    planner = runner_of(engine).planner
    planner.link, planner.pairs_per_second = LINK, math.inf
    return engine


def runner_of(engine: RecordedEngine) -> RingRunner:
    runner = engine.runner.inner
    assert isinstance(runner, RingRunner)
    return runner


class SideBySide:
    """Two engines, one rank and many, that get the same requests."""

    def __init__(self, folder: Path, ranks: int, *, one: dict[str, Any], **options: Any) -> None:
        """`options` are those of both engines; `one` replaces some for the single rank."""
        self.one = ringed_engine(folder, 1, **{**options, **one})
        self.many = ringed_engine(folder, ranks, **options)

    def finish(self, *requests: Request) -> float:
        """Run the requests on both; return the largest KL divergence of their logits, in nats.

        Compared are all samples up to the first that differs.
        """
        for engine in (self.one, self.many):
            engine.logits.clear()
            engine.finish(*requests)
        assert self.one.logits.keys() == self.many.logits.keys()
        return max(self._divergences())

    def _divergences(self) -> Iterable[float]:
        for name, rows in self.one.logits.items():
            others = self.many.logits[name]
            tokens = zip(self.one.tokens_of(name), self.many.tokens_of(name), strict=False)
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], tokens))
            assert min(rows) in others
            for length, row in rows.items():
                if length <= same:
                    logs, other_logs = (r.double().log_softmax(-1) for r in (row, others[length]))
                    yield float((logs.exp() * (logs - other_logs)).sum().abs())


def bytes_sent(engine: RecordedEngine) -> int:
    """Return the bytes that all ranks have sent so far."""
    ranks = runner_of(engine).ranks
    assert isinstance(ranks, VirtualRanks)
    return sum(transport.bytes_sent for transport in ranks.transports)

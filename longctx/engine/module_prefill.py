"""Whatever waiting prompts want to borrow and the device does not hold is computed first.

That is an ordinary prompt without an answer, in the class of who waits: it finds what is cached,
waits for what another computes, loads what lower tiers have, and computes the rest as it was
computed before. So a missing block makes an answer later, never different.
"""

import itertools
from dataclasses import replace

from longctx.engine.ingestion import Ingestion
from longctx.engine.input_processor import Intake
from longctx.engine.request_state import Answers
from longctx.engine.scheduler import Scheduler
from longctx.engine.sequence import Sequence
from longctx.errors import LongctxError
from longctx.kv.cache_manager import KVCacheManager
from longctx.kv.layout import Source
from longctx.kv.prefix_index import PrefixName
from longctx.request import Request, SamplingParams, Segment

MOST_FETCHES = 8  # of each thing that a prompt borrows, before it gives up


class Fetches:
    def __init__(
        self,
        cache: KVCacheManager,
        intake: Intake,
        scheduler: Scheduler,
        ingestion: Ingestion | None,
    ) -> None:
        self._cache = cache
        self._intake = intake
        self._scheduler = scheduler
        self._ingestion = ingestion
        self._running: dict[PrefixName, Sequence] = {}
        self._numbers = itertools.count()

    def begin(self) -> dict[str, Answers]:
        """By id: requests, scheduled now, that compute what is wanted and not computed yet.

        What the first in rank wants may take the place of what nobody uses; what others want only
        room that is free. Else they would take each other's modules away.
        """
        resident = self._cache.prefixes
        wanted = {name: both for name, both in self._cache.wanted.items() if name not in resident}
        self._cache.wanted = {}
        if not wanted:
            return {}
        begun = {}
        first = min((asker for _, asker in wanted.values()), key=lambda asker: asker.rank)
        room = self._cache.memory.packed[0].available - sum(
            sequence.full_blocks() - sequence.layout.blocks(sequence.computed)
            for sequence in self._running.values()
        )
        for name, (source, asker) in sorted(wanted.items(), key=lambda item: item[1][1].rank):
            running = self._running.get(name)
            if running is not None:
                _hurry(running, asker)
            elif asker is first or len(source.keys) <= room:
                room -= len(source.keys)
                sequence = self._fetch(source, asker)
                if sequence is not None:
                    self._running[name] = sequence
                    answers = Answers(sequence.request, [sequence], hidden=True)
                    begun[sequence.request.request_id] = answers
        return begun

    def _fetch(self, source: Source, asker: Sequence) -> Sequence | None:
        """A sequence, already scheduled; None if the asker has to give up instead."""
        asker.tier.fetches += 1
        if asker.tier.fetches > MOST_FETCHES * len(asker.layout.sources):
            asker.tier.failure = (
                "what this prompt borrows does not stay on the device until all of it is there; "
                "raise --device-pool-gib or lower --max-sequences"
            )
            return None
        request = Request(
            request_id=f"fetch {next(self._numbers)} of {source.owner}",
            segments=(Segment(encodes=source.owner),),
            sampling=SamplingParams(max_tokens=0),
            request_class=asker.request.request_class,
            salt=asker.request.salt,
        )
        try:
            sequence = self._intake.encoding(source, request)
        except LongctxError as error:
            asker.tier.failure = str(error)
            return None
        self._scheduler.waiting.append(sequence)  # however many wait: the asker was let in
        if self._ingestion is not None:
            self._ingestion.register(sequence)
        return sequence

    def ended(self, sequence: Sequence, error: str | None) -> None:
        """A fetch is over; who waits for what it was to compute shares its error."""
        ended = [name for name, running in self._running.items() if running is sequence]
        for name in ended:
            del self._running[name]
            for waiting in self._scheduler.waiting if error is not None else ():
                if any(source.name == name for source in waiting.layout.sources):
                    waiting.tier.failure = error


def _hurry(running: Sequence, asker: Sequence) -> None:
    """A fetch is as urgent as the most urgent of those who wait for it."""
    request_class = min(running.request.request_class, asker.request.request_class)
    running.request = replace(running.request, request_class=request_class)

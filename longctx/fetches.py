"""Whatever waiting prompts want to borrow and the device does not hold is computed first.

That is an ordinary prompt without an answer, in the class of who waits: it finds what is cached,
waits for what another computes, loads what lower tiers have, and computes the rest as it was
computed before. So a missing block makes an answer later, never different.
"""

import itertools

from longctx.answers import Answers
from longctx.errors import LongctxError
from longctx.intake import Intake
from longctx.kv_cache import KVCacheManager
from longctx.request import Request, SamplingParams, Segment
from longctx.scheduler import Scheduler
from longctx.sequence import Sequence
from prompt_cache.prefix import PrefixName

MOST_FETCHES = 8  # of each thing that a prompt borrows, before it gives up


class Fetches:
    def __init__(self, cache: KVCacheManager, intake: Intake, scheduler: Scheduler) -> None:
        self._cache = cache
        self._intake = intake
        self._scheduler = scheduler
        self._running: dict[PrefixName, str] = {}  # and their request ids
        self._numbers = itertools.count()

    def begin(self) -> dict[str, Answers]:
        """By id: requests, scheduled now, that compute what is wanted and not computed yet."""
        wanted, self._cache.wanted = self._cache.wanted, {}
        begun = {}
        for name, (source, asker) in wanted.items():
            if name in self._running:
                continue
            asker.tier.fetches += 1
            if asker.tier.fetches > MOST_FETCHES * len(asker.layout.sources):
                asker.tier.failure = (
                    "what this prompt borrows does not stay on the device until all of it is "
                    "there; raise --device-pool-gib or lower --max-sequences"
                )
                continue
            request = Request(
                request_id=f"fetch {next(self._numbers)} of {source.owner}",
                segments=(Segment(encodes=source.owner),),
                sampling=SamplingParams(max_tokens=0),
                request_class=asker.request.request_class,
                salt=asker.request.salt,
            )
            try:
                sequence = self._intake.encoding(source, request)
                self._scheduler.add(sequence)
            except LongctxError as error:
                asker.tier.failure = str(error)
                continue
            self._running[name] = request.request_id
            begun[request.request_id] = Answers(request, [sequence], hidden=True)
        return begun

    def ended(self, sequence: Sequence, error: str | None) -> None:
        """A request is over; who waits for what it was to compute shares its error."""
        ended = [n for n, i in self._running.items() if i == sequence.request.request_id]
        for name in ended:
            del self._running[name]
            for waiting in self._scheduler.waiting if error is not None else ():
                if any(source.name == name for source in waiting.layout.sources):
                    waiting.tier.failure = error

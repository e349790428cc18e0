"""Whatever waiting prompts want to borrow and the device does not hold is computed first.

That is an ordinary prompt without an answer, in the class of who waits: it finds what is cached,
waits for what another computes, loads what lower tiers have, and computes the rest as it was
computed before. So a missing block makes an answer later, never different.
"""

import itertools

from longctx.engine.ingestion import Ingestion
from longctx.engine.input_processor import InputProcessor
from longctx.engine.request_state import RequestState
from longctx.engine.scheduler import Scheduler
from longctx.engine.sequence import Sequence
from longctx.errors import LongctxError
from longctx.kv.cache_manager import KVCacheManager
from longctx.kv.layout import CachedChain
from longctx.kv.prefix_index import PrefixName
from longctx.request import Request, SamplingParams, Segment

MAX_MODULE_PREFILLS = 8  # of each thing that a prompt borrows, before it gives up


class ModulePrefills:
    def __init__(
        self,
        cache: KVCacheManager,
        inputs: InputProcessor,
        scheduler: Scheduler,
        ingestion: Ingestion | None,
    ) -> None:
        self._cache = cache
        self._inputs = inputs
        self._scheduler = scheduler
        self._ingestion = ingestion
        self._running: dict[PrefixName, Sequence] = {}
        self._numbers = itertools.count()

    def begin(self) -> dict[str, RequestState]:
        """By id: requests, scheduled now, that compute what is wanted and not computed yet.

        What the first in rank wants may take the place of what nobody uses; what others want only
        room that is free. Else they would take each other's modules away.
        """
        resident = self._cache.prefixes
        waiting = {sequence.blocks: sequence for sequence in self._scheduler.waiting}
        missing = [
            (waiting[blocks], chain)
            for name, (chain, blocks) in self._cache.wanted.items()
            if name not in resident and blocks in waiting  # else its request has ended meanwhile
        ]
        self._cache.wanted = {}
        if not missing:
            return {}
        missing.sort(key=lambda pair: pair[0].blocks.preemption_key)
        first, _ = missing[0]
        free_blocks = self._cache.memory.packed[0].available - sum(
            sequence.blocks.full_blocks() - sequence.blocks.layout.blocks(sequence.blocks.computed)
            for sequence in self._running.values()
        )
        begun = {}
        for waiter, chain in missing:
            running = self._running.get(chain.name)
            if running is not None:
                running.prioritize(waiter.request.request_class)
            elif waiter is first or len(chain.keys) <= free_blocks:
                free_blocks -= len(chain.keys)
                sequence = self._prefill(chain, waiter)
                if sequence is not None:
                    self._running[chain.name] = sequence
                    state = RequestState(sequence.request, [sequence], internal=True)
                    begun[sequence.request.request_id] = state
        return begun

    def _prefill(self, chain: CachedChain, waiter: Sequence) -> Sequence | None:
        """A sequence, already scheduled; None if the waiter has to give up instead."""
        waiter.blocks.offload.module_prefills += 1
        if waiter.blocks.offload.module_prefills > MAX_MODULE_PREFILLS * len(
            waiter.blocks.layout.chains
        ):
            waiter.blocks.offload.failure = (
                "what this prompt borrows does not stay on the device until all of it is there; "
                "raise --device-pool-gib or lower --max-sequences"
            )
            return None
        request = Request(
            request_id=f"fetch {next(self._numbers)} of {chain.owner}",
            segments=(Segment(encodes=chain.owner),),
            sampling=SamplingParams(max_tokens=0),
            request_class=waiter.request.request_class,
            salt=waiter.request.salt,
        )
        try:
            sequence = self._inputs.prefill_of(chain, request)
        except LongctxError as error:
            waiter.blocks.offload.failure = str(error)
            return None
        self._scheduler.waiting.append(sequence)  # however many wait: the waiter was let in
        if self._ingestion is not None:
            self._ingestion.register(sequence)
        return sequence

    def on_ended(self, sequence: Sequence, error: str | None) -> None:
        """A fetch is over; who waits for what it was to compute shares its error."""
        ended = [name for name, running in self._running.items() if running is sequence]
        for name in ended:
            del self._running[name]
            for waiting in self._scheduler.waiting if error is not None else ():
                if any(chain.name == name for chain in waiting.blocks.layout.chains):
                    waiting.blocks.offload.failure = error

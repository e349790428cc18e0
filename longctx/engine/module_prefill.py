"""Computes what waiting prompts are to reuse and the device does not hold.

A module prefill is an ordinary request without an answer, in the class of the request that waits:
it finds what is cached, waits for what another sequence computes, loads what lower tiers have, and
computes the rest as it was computed before. So a missing block makes an answer later, never
different.
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

MAX_MODULE_PREFILLS = 8  # for each chain that a prompt reuses, before it fails


class ModulePrefills:
    """Starts the internal requests that compute missing chains, one at a time for each chain.

    The cache manager notes which chains waiting sequences miss (`KVCacheManager.wanted`). In each
    step, after admission, the engine calls `begin`, which schedules prefills for them, and when one
    of these has ended it calls `on_ended`. Only the engine's thread calls it.
    """

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
        """Schedule prefills of the chains that are missing; return their requests by id.

        Only the highest-priority waiter may evict idle prefixes; others use free pages. Otherwise
        waiters would evict each other's modules forever (livelock). On a device of 10 blocks, A
        reuses modules x and y of 4 blocks each, and B reuses u and v, as large. If both evicted,
        B's u and v could take the place of A's x and y before A runs, then A's that of B's, and so
        on. Since only A evicts, x and y stay until A has run; B's u waits for free pages, and
        after A, B is the one that evicts.
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
        """Schedule a prefill and return its sequence; None where the waiter fails instead."""
        waiter.blocks.offload.module_prefills += 1
        if waiter.blocks.offload.module_prefills > MAX_MODULE_PREFILLS * len(
            waiter.blocks.layout.chains
        ):
            waiter.blocks.offload.failure = (
                "what this prompt reuses does not stay on the device until all of it is there; "
                "raise --device-pool-gib or lower --max-sequences"
            )
            return None
        request = Request(
            request_id=f"prefill {next(self._numbers)} of {chain.owner}",
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
        self._scheduler.waiting.append(sequence)  # not `add`: the waiter was let in already
        if self._ingestion is not None:
            self._ingestion.register(sequence)
        return sequence

    def on_ended(self, sequence: Sequence, error: str | None) -> None:
        """Note that a prefill has ended; sequences that wait for its chain share its error."""
        ended = [name for name, running in self._running.items() if running is sequence]
        for name in ended:
            del self._running[name]
            for waiting in self._scheduler.waiting if error is not None else ():
                if any(chain.name == name for chain in waiting.blocks.layout.chains):
                    waiting.blocks.offload.failure = error

"""Who runs in the next step, and with how many tokens.

Answers first: every answering sequence computes its one token. Prompt chunks share the rest of the
step's token budget: classes by turns, each with a guaranteed share, and within a class the least
remaining work first, with ageing. While answers run, each class may take only so much of the
*time*: `DutyCycle` measures what its chunks cost the answers and holds it back until that is
repaid.

When memory runs out, blocks that nobody holds have gone already; then the sequence of the highest
rank (youngest of the lowest class) gives way, back to waiting. The lowest rank never gives way,
so it always progresses.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from longctx.config import SchedulerConfig
from longctx.engine.sequence import Sequence, SequenceState
from longctx.errors import Overloaded
from longctx.kv.cache_manager import Admission, KVCacheManager
from longctx.kv.sequence_blocks import SequenceBlocks
from longctx.request import RequestClass

# Shares of the prompt tokens when several classes compete.
CLASS_WEIGHT = {RequestClass.INTERACTIVE: 8, RequestClass.BATCH: 2, RequestClass.INGEST: 1}
# Shares of the time that prompt chunks of a class may take from running answers.
TIME_SHARE = {RequestClass.INTERACTIVE: 0.7, RequestClass.BATCH: 0.4, RequestClass.INGEST: 0.1}
# Waiting a second counts as this much less work, so that a long prompt's turn comes.
AGEING_TOKENS_PER_SECOND = 500.0


@dataclass(frozen=True, slots=True)
class Chunk:
    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """A token is drawn after this chunk: it computes all that the sequence has."""
        return (
            self.num_tokens == self.sequence.blocks.remaining
            and self.sequence.request.sampling.max_tokens > 0
        )


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """`complete`: prompts without an answer of which nothing was left to compute."""

    chunks: tuple[Chunk, ...]
    complete: tuple[Sequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


class DutyCycle:
    """Keeps prompt chunks to their share of the time while answers run.

    A step's cost beyond that of a step with answers alone is a debt of the classes that had chunks
    in it; steps without chunks of a class repay it, and so does time in which no answer runs. The
    answers' own time is a running mean.
    """

    def __init__(self) -> None:
        self._decode_seconds = 0.0
        self._debt: dict[RequestClass, float] = dict.fromkeys(RequestClass, 0.0)

    def allows(self, request_class: RequestClass) -> bool:
        return self._debt[request_class] <= 0

    def record(self, tokens_of: dict[RequestClass, int], seconds: float, *, decoding: bool) -> None:
        """One step took `seconds` with so many prompt tokens of each class."""
        if not decoding:
            self._debt = {c: max(0.0, debt - seconds) for c, debt in self._debt.items()}
            return
        total = sum(tokens_of.values())
        if not total:
            mean = self._decode_seconds
            self._decode_seconds = seconds if mean == 0 else 0.9 * mean + 0.1 * seconds
        extra = max(0.0, seconds - self._decode_seconds)
        for request_class, share in TIME_SHARE.items():
            tokens = tokens_of.get(request_class, 0)
            if tokens:
                self._debt[request_class] += extra * tokens / total
            else:
                repaid = seconds * share / (1 - share)
                self._debt[request_class] = max(0.0, self._debt[request_class] - repaid)


class Scheduler:
    def __init__(
        self,
        config: SchedulerConfig,
        cache: KVCacheManager,
        *,
        batch_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._cache = cache
        self._batch_tokens = batch_tokens
        self._clock = clock
        self._duty = DutyCycle()
        self._served = dict.fromkeys(RequestClass, 0.0)  # prompt tokens by weight, for taking turns
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0

    @property
    def max_sequences(self) -> int:
        return self._config.max_sequences

    def add(self, sequence: Sequence) -> None:
        if len(self.waiting) >= self._config.max_waiting:
            raise Overloaded(
                f"{len(self.waiting)} requests are waiting and --max-waiting allows no more; "
                "try again later"
            )
        self.waiting.append(sequence)

    def add_fork(self, sequence: Sequence) -> None:
        """A sequence that shares the memory of a running one, and runs at once."""
        sequence.state = SequenceState.RUNNING
        self.running.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Finished or aborted; its memory is free from now on."""
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
            self._cache.release(sequence.blocks)
        elif sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
            self._cache.leave_load(sequence.blocks)
        sequence.state = SequenceState.FINISHED

    def failed(self) -> list[tuple[Sequence, str]]:
        """Sequences that the lower tiers cannot serve, which are to be ended, and why."""
        everyone = (*self.running, *self.waiting)
        failures = ((sequence, sequence.blocks.offload.failure) for sequence in everyone)
        return [(sequence, failure) for sequence, failure in failures if failure is not None]

    def schedule(self) -> SchedulerOutput:
        decodes = self._decode_chunks()
        prompts: list[Chunk] = []
        budget = self._batch_tokens - len(decodes)
        queues = self._queues()
        for request_class in self._turns(queues):
            if decodes and not self._duty.allows(request_class):
                continue
            for sequence in queues[request_class]:
                chunk = self._prompt_chunk(sequence, budget) if budget > 0 else None
                if chunk is not None:
                    prompts.append(chunk)
                    begin = sequence.blocks.computed
                    budget -= sequence.blocks.layout.charge(begin, begin + chunk.num_tokens)
        # A prompt chunk may have preempted what was scheduled before it.
        chunks = (chunk for chunk in (*decodes, *prompts) if _is_running(chunk.sequence))
        complete = (sequence for sequence in self.running if sequence.blocks.remaining == 0)
        return SchedulerOutput(tuple(chunks), tuple(complete))

    def update(self, output: SchedulerOutput, seconds: float) -> None:
        """The step has run: account for it and publish what it computed."""
        tokens_of: dict[RequestClass, int] = defaultdict(int)
        decoding = False
        for chunk in output.chunks:
            if chunk.sequence.decoding:
                decoding = True
            else:
                tokens_of[chunk.sequence.request.request_class] += chunk.num_tokens
        for request_class, tokens in tokens_of.items():
            self._served[request_class] += tokens / CLASS_WEIGHT[request_class]
        self._duty.record(tokens_of, seconds, decoding=decoding)
        for chunk in output.chunks:
            share = seconds * chunk.num_tokens / output.num_tokens
            self._cache.commit(chunk.sequence.blocks, chunk.num_tokens, share)
            chunk.sequence.computed_tokens += chunk.num_tokens

    def _decode_chunks(self) -> list[Chunk]:
        """One token for each answering sequence, lowest rank first."""
        chunks: list[Chunk] = []
        decoding = (sequence for sequence in self.running if sequence.decoding)
        for sequence in sorted(decoding, key=lambda sequence: sequence.blocks.preemption_key):
            if _is_running(sequence):  # or an earlier one has preempted it
                if self._allocate(sequence, 1):
                    chunks.append(Chunk(sequence, 1))
                else:
                    self.preempt(sequence)
        return chunks

    def _queues(self) -> dict[RequestClass, list[Sequence]]:
        """Who has prompt to compute, by class, the least work first.

        A sequence that others wait for is as urgent as the most urgent of them.
        """
        urgency: dict[SequenceBlocks, RequestClass] = {}
        for waiting in self.waiting:
            owner = self._cache.computed_by(waiting.blocks)
            if owner is not None:
                wanted = waiting.request.request_class
                urgency[owner] = min(wanted, urgency.get(owner, wanted))
        now = self._clock()

        def work(sequence: Sequence) -> tuple[float, int]:
            aged = AGEING_TOKENS_PER_SECOND * (now - sequence.arrival_seconds)
            return sequence.blocks.remaining - aged, sequence.arrival

        queues: dict[RequestClass, list[Sequence]] = defaultdict(list)
        for sequence in sorted((*self.running, *self.waiting), key=work):
            if not sequence.decoding:
                own = sequence.request.request_class
                queues[min(own, urgency.get(sequence.blocks, own))].append(sequence)
        return queues

    def _turns(self, present: Iterable[RequestClass]) -> list[RequestClass]:
        """The classes present, the one served least for its weight first."""
        present = set(present)
        if present:  # who is away does not save up turns
            least = min(self._served[c] for c in present)
            for request_class in set(RequestClass) - present:
                self._served[request_class] = max(self._served[request_class], least)
        return sorted(present, key=lambda c: (self._served[c], c))

    def _prompt_chunk(self, sequence: Sequence, budget: int) -> Chunk | None:
        if sequence.state is SequenceState.WAITING and not self._admit(sequence):
            return None
        if not _is_running(sequence):
            return None  # an earlier chunk of this step has preempted it
        layout, begin = sequence.blocks.layout, sequence.blocks.computed
        num_tokens = min(sequence.blocks.remaining, layout.within(begin, budget))
        if num_tokens == 0:
            return None
        if num_tokens < sequence.blocks.remaining:
            # Ending at a block boundary saves carrying an open block.
            end = layout.tokens(layout.blocks(begin + num_tokens))
            num_tokens = end - begin if end > begin else num_tokens
        return Chunk(sequence, num_tokens) if self._allocate(sequence, num_tokens) else None

    def _admit(self, sequence: Sequence) -> bool:
        width = sum(running.width for running in self.running)
        if width + sequence.width > self._config.max_sequences:
            return False
        admission = self._cache.admit(sequence.blocks, spare_blocks=len(self.running))
        if admission is not Admission.ADMITTED:
            return False
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.state = SequenceState.RUNNING
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.blocks.computed
        return True

    def _allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Pages for the next tokens, if need be from sequences of higher rank."""
        while not self._cache.allocate(sequence.blocks, num_tokens):
            victim = max(self.running, key=lambda running: running.blocks.preemption_key)
            if victim.blocks.preemption_key <= sequence.blocks.preemption_key:
                return False
            self.preempt(victim)
        return True

    def preempt(self, sequence: Sequence) -> None:
        """A running sequence gives its memory back and waits to be admitted again."""
        self.running.remove(sequence)
        self._cache.release(sequence.blocks)
        sequence.state = SequenceState.WAITING
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.append(sequence)


def _is_running(sequence: Sequence) -> bool:
    return sequence.state is SequenceState.RUNNING

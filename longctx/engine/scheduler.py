"""Decides which sequences run in the next step, and with how many tokens each.

Decoding comes first: every decoding sequence computes its one token. Prompt chunks share the rest
of the step's token budget: classes take turns, each with a guaranteed share, and within a class the
least remaining work comes first, with ageing. While sequences decode, each class may take only so
much of the *time*: `DutyCycle` measures by how much its chunks delay decoding, and holds the class
back until that is repaid.

When memory runs out, blocks that nobody holds have gone already. Then the sequence with the largest
preemption key (the youngest of the lowest class) is preempted, back to waiting. The sequence with
the smallest key is never preempted, so it always progresses.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from compress.shape import BLOCK_TOKENS
from longctx.config import SchedulerConfig
from longctx.engine.sequence import Sequence, SequenceState
from longctx.errors import Overloaded
from longctx.kv.cache_manager import Admission, KVCacheManager
from longctx.kv.sequence_blocks import SequenceBlocks
from longctx.request import RequestClass

# Relative shares of the prompt tokens that classes get when they compete.
CLASS_WEIGHT = {RequestClass.INTERACTIVE: 8, RequestClass.BATCH: 2, RequestClass.INGEST: 1}
# The share of the time by which prompt chunks of a class may delay decoding sequences.
TIME_SHARE = {RequestClass.INTERACTIVE: 0.7, RequestClass.BATCH: 0.4, RequestClass.INGEST: 0.1}
# Each second of waiting counts as this much less work, so that a long prompt's turn comes: one of
# 2,000 tokens that has waited for 4 s counts as 2,000 - 4 * 500 = 0 tokens, and goes before one of
# 128 tokens that has just come.
AGEING_TOKENS_PER_SECOND = 500.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sequence, and how many of its tokens that are not computed yet a step computes."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether a token is sampled after this chunk, since it computes all tokens so far."""
        return (
            self.num_tokens == self.sequence.blocks.remaining
            and self.sequence.request.sampling.max_tokens > 0
        )

    @property
    def logits_rows(self) -> int:
        """How many of its last rows need logits: all where the prompt is scored."""
        return self.num_tokens if self.sequence.scores_prompt else int(self.samples)


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """What one step computes.

    `complete` holds the prompts to be kept (`max_tokens` 0) of which nothing is left to compute.
    """

    chunks: tuple[Chunk, ...]
    complete: tuple[Sequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


class DutyCycle:
    """Keeps prompt chunks to their share of the time while sequences decode.

    What a step takes beyond a step that only decodes is a debt of the classes that had chunks in
    it, split by their tokens; a class with a debt gets no chunk. Steps without chunks of a class
    repay its debt, by `share / (1 - share)` of their time, so that in the long run the class takes
    its share. A step in which nothing decodes repays by all of its time. What a step that only
    decodes takes is known as a running mean.

    An ingestion has the share 0.1. Decoding alone takes 10 ms a step, and a step with a chunk of
    the ingestion takes 50 ms: a debt of 40 ms. Each step without one repays 10 ms * 0.1 / 0.9 =
    1.1 ms, so the next chunk comes after 36 steps. The chunk has then taken 40 ms of the 410 ms
    that went by, a tenth.

    The scheduler calls `allows` before each step and `record` after it, in the engine's thread.
    """

    def __init__(self) -> None:
        self._decode_seconds = 0.0
        self._debt: dict[RequestClass, float] = dict.fromkeys(RequestClass, 0.0)

    def allows(self, request_class: RequestClass) -> bool:
        """Whether the class has repaid its debt, so that the step may have chunks of it."""
        return self._debt[request_class] <= 0

    def record(self, tokens_of: dict[RequestClass, int], seconds: float, *, decoding: bool) -> None:
        """Account for a step that took `seconds` with so many prompt tokens of each class."""
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
    """Holds the sequences that run and wait, and says what the next step computes.

    A sequence comes in through `add` (or `add_fork`), is admitted to `running` by `schedule` as
    soon as there is room for it, may be preempted back to `waiting` any number of times, and
    leaves through `remove`. For each step the engine calls `schedule`, computes what that returns,
    and calls `update`; only then is the next `schedule` right.

    One thread, the engine's, makes all calls. All blocks are had through the `KVCacheManager`.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: KVCacheManager,
        *,
        batch_tokens: int,
        scored_tokens: int = BLOCK_TOKENS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`scored_tokens`: of prompts whose log-probabilities are told, so many in one step, since
        each needs a row of logits."""
        self._config = config
        self._cache = cache
        self._batch_tokens = batch_tokens
        self._scored_tokens = scored_tokens
        self._clock = clock
        self._duty = DutyCycle()
        self._served = dict.fromkeys(RequestClass, 0.0)  # prompt tokens / weight
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0

    @property
    def max_sequences(self) -> int:
        return self._config.max_sequences

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises Overloaded where `max_waiting` others wait already."""
        if len(self.waiting) >= self._config.max_waiting:
            raise Overloaded(
                f"{len(self.waiting)} requests are waiting and --max-waiting allows no more; "
                "try again later"
            )
        self.waiting.append(sequence)

    def add_fork(self, sequence: Sequence) -> None:
        """Let a sequence run at once, which shares the memory of a running one."""
        sequence.state = SequenceState.RUNNING
        self.running.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has finished or is aborted, and free its memory."""
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
            self._cache.release(sequence.blocks)
        elif sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
            self._cache.leave_load(sequence.blocks)
        sequence.state = SequenceState.FINISHED

    def failed(self) -> list[tuple[Sequence, str]]:
        """Return the sequences that the lower tiers cannot serve, and why; the engine ends them."""
        everyone = (*self.running, *self.waiting)
        failures = ((sequence, sequence.blocks.offload.failure) for sequence in everyone)
        return [(sequence, failure) for sequence, failure in failures if failure is not None]

    def schedule(self) -> SchedulerOutput:
        """Choose the chunks of the next step and allocate their pages.

        A budget of 512 tokens, 12 sequences that decode, a question with 700 tokens left, and an
        ingestion with 5,000:

        - the 12 get one token each, which leaves 500;
        - the question's class has the turn. Its 700 tokens do not fit, so its chunk ends at a block
          boundary: from token 0 on it is 448 tokens, 7 blocks, which leaves 52;
        - the ingestion gets 52 tokens, unless its class still has a debt (`DutyCycle`). They end
          within a block, since they reach no boundary.

        In the next step the question has 252 tokens left. The class that was served least for its
        weight then has the first turn: 448 / 8 = 56 for the question, 52 / 1 = 52 for the
        ingestion, so it is the ingestion's.
        """
        decodes = self._decode_chunks()
        prompts: list[Chunk] = []
        budget, scored = self._batch_tokens - len(decodes), self._scored_tokens
        queues = self._queues()
        for request_class in self._turns(queues):
            if decodes and not self._duty.allows(request_class):
                continue
            for sequence in queues[request_class]:
                room = min(budget, scored) if sequence.scores_prompt else budget
                chunk = self._prompt_chunk(sequence, room) if room > 0 else None
                if chunk is not None:
                    prompts.append(chunk)
                    scored -= chunk.num_tokens if sequence.scores_prompt else 0
                    begin = sequence.blocks.computed
                    budget -= sequence.blocks.layout.charge(begin, begin + chunk.num_tokens)
        # A later chunk may have preempted a sequence that was scheduled before it.
        chunks = (chunk for chunk in (*decodes, *prompts) if _is_running(chunk.sequence))
        complete = (sequence for sequence in self.running if sequence.blocks.remaining == 0)
        return SchedulerOutput(tuple(chunks), tuple(complete))

    def update(self, output: SchedulerOutput, seconds: float) -> None:
        """Account for a step that has run in `seconds`, and publish the blocks that it filled."""
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
        """Return a chunk of one token for each decoding sequence, smallest preemption key first."""
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
        """Return the sequences that have prompt to compute, by class, the least work first.

        A sequence that others wait for counts in the most urgent class of them.
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
        """Return the classes present, the one that was served least for its weight first."""
        present = set(present)
        if present:  # a class that is absent does not save up turns
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
        """Allocate pages for the next tokens, preempting sequences with larger keys if need be."""
        while not self._cache.allocate(sequence.blocks, num_tokens):
            victim = max(self.running, key=lambda running: running.blocks.preemption_key)
            if victim.blocks.preemption_key <= sequence.blocks.preemption_key:
                return False
            self.preempt(victim)
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Free the memory of a running sequence, which then waits to be admitted again."""
        self.running.remove(sequence)
        self._cache.release(sequence.blocks)
        sequence.state = SequenceState.WAITING
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.append(sequence)


def _is_running(sequence: Sequence) -> bool:
    return sequence.state is SequenceState.RUNNING

"""Decides which sequences run in the next step, and with how many tokens each.

Decoding comes first: every decoding sequence computes its one token. Prompt chunks share the rest
of the step, which is limited in tokens and, by the cost model's prediction, in time. Classes take
turns, each with a guaranteed share; the tenant that was served least in its class comes first
(a virtual token counter, https://arxiv.org/abs/2401.00588, that counts seconds instead), and of its
prompts the one with the least work left, but for a share of the oldest one. While sequences decode,
each class may take only so much of the time (`TimeShares`); a step without them may take the longer
the longer nobody has come (`LoneSteps`).

When memory runs out, blocks that nobody holds have gone already. Then the sequence with the largest
preemption key (the youngest of the lowest class) is preempted, back to waiting. The sequence with
the smallest key is never preempted, so it always progresses.
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial

from compress.shape import BLOCK_TOKENS
from longctx.config import SchedulerConfig
from longctx.engine.cost_model import CostModel, StepWork
from longctx.engine.sequence import Sequence, SequenceState
from longctx.engine.tenants import Tenants
from longctx.engine.time_shares import LoneSteps, TimeShares
from longctx.engine_stats import ClassStats, SchedulerStats
from longctx.errors import Overloaded
from longctx.kv.cache_manager import Admission, KVCacheManager
from longctx.kv.sequence_blocks import SequenceBlocks
from longctx.request import RequestClass

# Relative shares of the prompt tokens that classes get when they compete.
CLASS_WEIGHT = {RequestClass.INTERACTIVE: 8, RequestClass.BATCH: 2, RequestClass.INGEST: 1}
# Of a class's prompt tokens the part that is for the oldest prompt of the tenant whose turn it is,
# so that a long one progresses however many short ones keep coming. Not more of it, and no ageing:
# a prompt of minutes that has become urgent would let every chat wait until it is done.
OLDEST_SHARE = 1 / 8
# How long an estimate of what the caches have of a waiting prompt is good for.
ESTIMATE_SECONDS = 1.0
# The smallest part of a block that a step computes where a whole block takes too long: fewer rows
# take hardly less time.
MIN_CHUNK_TOKENS = 16
# What a token counts at least in a step's time, where the cost model takes it for nothing.
LEAST_TOKEN_SECONDS = 1e-9


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sequence, and how many of its tokens that are not computed yet a step computes."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether a token is sampled after this chunk, since it computes all tokens so far."""
        return self.num_tokens == self.sequence.blocks.remaining and self.sequence.max_tokens > 0

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


@dataclass(frozen=True, slots=True)
class StepRoom:
    """What is left of a step: tokens, seconds until the objective, and seconds of the class.

    `alone` says that nothing decodes in it, `empty` that no prompt has a chunk in it yet.
    """

    tokens: int
    seconds: float
    share_seconds: float
    alone: bool
    empty: bool


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
        target_seconds: float,
        cost: CostModel,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Aim at steps of `target_seconds`, as `cost` predicts, and `batch_tokens` at most.

        `scored_tokens`: of prompts whose log-probabilities are told, so many in one step, since
        each needs a row of logits.
        """
        self._config = config
        self._cache = cache
        self.batch_tokens = batch_tokens
        self._scored_tokens = scored_tokens
        self._target_seconds = target_seconds
        self._clock = clock
        self.cost = cost
        self._shares = TimeShares()
        self._lone = LoneSteps(target_seconds, clock())
        self._tenants = {each: Tenants() for each in RequestClass}
        self._served = dict.fromkeys(RequestClass, 0.0)  # prompt tokens / weight
        self._owed = dict.fromkeys(RequestClass, 0.0)  # prompt tokens, to the oldest prompts
        self._first: dict[Sequence, RequestClass] = {}  # that come first in this step by their age
        self._last_step = (0.0, 0.0)  # seconds that it took, and was predicted to take
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0

    @property
    def max_sequences(self) -> int:
        return self._config.max_sequences

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises Overloaded where more than `max_waiting` answers would wait.

        A request with `n` choices counts `n` times. One by itself is never too much.
        """
        waiting = sum(each.width for each in self.waiting)
        if waiting and waiting + sequence.width > self._config.max_waiting:
            raise Overloaded(
                f"{waiting} answers are waiting, and with {sequence.width} more they are more than "
                f"--max-waiting {self._config.max_waiting} allows; try again later"
            )
        own = sequence.request.request_class
        everyone = (*self.running, *self.waiting)
        present = {each.request.salt for each in everyone if each.request.request_class is own}
        self._tenants[own].join(sequence.request.salt, present)
        if own is not RequestClass.INGEST:
            self._lone.disturb(self._clock())
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

        The objective is 250 ms and 512 tokens a step. 4 sequences decode, which is predicted to
        take 70 ms; a question has 700 tokens left, and an ingestion 5,000:

        - the 4 get one token each, which leaves 508 tokens and 180 ms;
        - the question's class has the turn, and beside 70 ms of answers it may take 163 ms. That
          is predicted for 135 tokens, so its chunk is two blocks, 128 tokens in 154 ms;
        - 26 ms are left of the step, in which no block of the ingestion fits.

        The class that was served least for its weight has the first turn in the next step: 128 / 8
        for the question, 0 for the ingestion, so it is the ingestion's. Beside answers it may take
        8 ms. A block takes longer, but the first chunk of a step is never less: what it takes too
        much is taken from the steps that follow (`TimeShares`). Only where one block takes longer
        than the whole step may, its rows are divided among steps.
        """
        decodes = self._decode_chunks()
        answers = step_work(decodes)
        if decodes:
            answer_seconds = self.cost.seconds(answers)
            seconds = self._target_seconds - answer_seconds
            self._shares.begin(answer_seconds)
            self._lone.disturb(self._clock())
        else:
            seconds = self._lone.seconds(self._clock(), self.cost.coefficients.step)
        prompts: list[Chunk] = []
        tokens, scored = self.batch_tokens - len(decodes), self._scored_tokens
        queues = self._queues()
        for request_class in self._turns(queues):
            share = self._shares.left(request_class) if decodes else math.inf
            for sequence in queues[request_class]:
                most = min(tokens, scored) if sequence.scores_prompt else tokens
                if share <= 0 or tokens <= 0:
                    break
                if most <= 0:
                    continue
                room = StepRoom(most, seconds, share, alone=not decodes, empty=not prompts)
                chunk = self._prompt_chunk(sequence, room)
                if chunk is not None:
                    prompts.append(chunk)
                    scored -= chunk.num_tokens if sequence.scores_prompt else 0
                    begin = sequence.blocks.computed
                    layout = sequence.blocks.layout
                    tokens -= layout.charge(begin, begin + chunk.num_tokens)
                    taken = self.cost.chunk_seconds(chunk.num_tokens, layout.position(begin))
                    seconds, share = seconds - taken, share - taken
        # A later chunk may have preempted a sequence that was scheduled before it.
        chunks = (chunk for chunk in (*decodes, *prompts) if _is_running(chunk.sequence))
        complete = (sequence for sequence in self.running if sequence.blocks.remaining == 0)
        return SchedulerOutput(tuple(chunks), tuple(complete))

    def update(self, output: SchedulerOutput, seconds: float) -> None:
        """Account for a step that has run in `seconds`, and publish the blocks that it filled."""
        decodes = [chunk for chunk in output.chunks if chunk.sequence.decoding]
        answers = step_work(decodes)
        parts = self._parts(output.chunks)
        prompt_seconds = seconds
        if decodes:
            prompt_seconds = max(0.0, seconds - self.cost.seconds(answers))
        seconds_of: dict[RequestClass, float] = defaultdict(float)
        prompts = [chunk for chunk in output.chunks if not chunk.sequence.decoding]
        total = sum(parts[chunk] for chunk in prompts)
        for chunk in prompts:
            request_class = chunk.sequence.request.request_class
            seconds_of[request_class] += prompt_seconds * parts[chunk] / total
            self._served[request_class] += chunk.num_tokens / CLASS_WEIGHT[request_class]
            if chunk.sequence in self._first:
                self._owed[self._first[chunk.sequence]] -= chunk.num_tokens
            else:
                owed = self._owed[request_class] + OLDEST_SHARE * chunk.num_tokens
                self._owed[request_class] = min(owed, BLOCK_TOKENS)  # one turn: none are saved up
        if decodes:
            self._shares.record(seconds_of)
        else:
            self._shares.repay(seconds)
        work = step_work(output.chunks)
        self._last_step = (seconds, self.cost.seconds(work))
        self.cost.observe(work, seconds)
        for chunk in output.chunks:
            share = seconds * parts[chunk]
            request = chunk.sequence.request
            self._tenants[request.request_class].charge(request.salt, share)
            self._cache.commit(chunk.sequence.blocks, chunk.num_tokens, share)
            chunk.sequence.computed_tokens += chunk.num_tokens
            reached = max(chunk.sequence.reached_tokens, chunk.sequence.blocks.computed)
            chunk.sequence.reached_tokens = reached

    def stats(self) -> SchedulerStats:
        """Say what the scheduler aims at, what it has learned, and who is in line."""
        in_class: dict[RequestClass, list[Sequence]] = {each: [] for each in RequestClass}
        for sequence in (*self.running, *self.waiting):
            in_class[sequence.request.request_class].append(sequence)
        seconds, predicted = self._last_step
        return SchedulerStats(
            target_step_seconds=self._target_seconds,
            step_seconds=seconds,
            predicted_seconds=predicted,
            prediction_error=self.cost.median_error,
            seconds_per=asdict(self.cost.coefficients),
            classes={
                each.name.lower(): ClassStats(
                    running=sum(_is_running(sequence) for sequence in sequences),
                    waiting=sum(not _is_running(sequence) for sequence in sequences),
                    prompt_tokens_left=sum(
                        sequence.blocks.remaining for sequence in sequences if not sequence.decoding
                    ),
                    share_seconds_left=self._shares.left(each),
                )
                for each, sequences in in_class.items()
            },
            tenants=len({each.request.salt for each in (*self.running, *self.waiting)}),
        )

    def _parts(self, chunks: Iterable[Chunk]) -> dict[Chunk, float]:
        """Return what part of a step's time each chunk takes, as predicted."""
        costs = {
            chunk: self.cost.seconds(step_work([chunk])) + LEAST_TOKEN_SECONDS * chunk.num_tokens
            for chunk in chunks
        }
        total = sum(costs.values())
        return {chunk: cost / total for chunk, cost in costs.items()}

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
        """Return the sequences that have prompt to compute, by class, in the order of their turns.

        The tenant that was served least comes first, and of its prompts that with the least work,
        or the oldest one where its share is due. A sequence that others wait for counts in the most
        urgent class of them.
        """
        urgency: dict[SequenceBlocks, RequestClass] = {}
        for waiting in self.waiting:
            owner = self._cache.computed_by(waiting.blocks)
            if owner is not None:
                wanted = waiting.request.request_class
                urgency[owner] = min(wanted, urgency.get(owner, wanted))

        queues: dict[RequestClass, list[Sequence]] = defaultdict(list)
        for sequence in (*self.running, *self.waiting):
            if not sequence.decoding:
                own = sequence.request.request_class
                queues[min(own, urgency.get(sequence.blocks, own))].append(sequence)
        self._first = {}
        for request_class, queue in queues.items():
            queue.sort(key=partial(self._turn, self._tenants[request_class]))
            if self._owed[request_class] >= BLOCK_TOKENS:
                tenant = queue[0].request.salt
                same = (each for each in queue if each.request.salt == tenant)
                oldest = min(same, key=lambda each: each.arrival)
                queue.remove(oldest)
                queue.insert(0, oldest)
                self._first[oldest] = request_class
        return queues

    def _turn(self, tenants: Tenants, sequence: Sequence) -> tuple[float, int, int]:
        served = tenants.served_seconds(sequence.request.salt)
        return served, self._uncached(sequence), sequence.arrival

    def _uncached(self, sequence: Sequence) -> int:
        """Return how many tokens are left to compute; where it waits, as last estimated.

        Of a question on a document that was read that is the question, whatever the document is.
        """
        blocks = sequence.blocks
        if _is_running(sequence):
            return blocks.remaining
        now = self._clock()
        if now - sequence.estimated_seconds >= ESTIMATE_SECONDS:
            sequence.expected_tokens = self._cache.expected_tokens(blocks)
            sequence.estimated_seconds = now
        return blocks.remaining - sequence.expected_tokens

    def _turns(self, present: Iterable[RequestClass]) -> list[RequestClass]:
        """Return the classes present, the one that was served least for its weight first."""
        present = set(present)
        if present:  # a class that is absent does not save up turns
            least = min(self._served[c] for c in present)
            for request_class in set(RequestClass) - present:
                self._served[request_class] = max(self._served[request_class], least)
        return sorted(present, key=lambda c: (self._served[c], c))

    def _prompt_chunk(self, sequence: Sequence, room: StepRoom) -> Chunk | None:
        if sequence.state is SequenceState.WAITING and not self._admit(sequence):
            return None
        if not _is_running(sequence):
            return None  # an earlier chunk of this step has preempted it
        layout, begin = sequence.blocks.layout, sequence.blocks.computed
        to_boundary = layout.tokens(layout.blocks(begin) + 1) - begin
        smallest = min(sequence.blocks.remaining, to_boundary)
        tokens = self._fitting_tokens(layout.position(begin), smallest, room)
        num_tokens = min(sequence.blocks.remaining, layout.within(begin, tokens))
        if num_tokens == 0:
            return None
        if num_tokens < sequence.blocks.remaining:
            # Ending at a block boundary saves carrying an open block.
            end = layout.tokens(layout.blocks(begin + num_tokens))
            num_tokens = end - begin if end > begin else num_tokens
        return Chunk(sequence, num_tokens) if self._allocate(sequence, num_tokens) else None

    def _fitting_tokens(self, past: int, smallest: int, room: StepRoom) -> int:
        """Return how long a chunk may be, of which `smallest` tokens come before a boundary."""
        if not self.cost.knows_prompts:
            return room.tokens if room.alone else min(room.tokens, smallest)
        fitting = self.cost.chunk_tokens(min(room.seconds, room.share_seconds), past)
        if fitting < smallest:
            if not room.empty:
                return 0
            whole_step = self.cost.chunk_tokens(room.seconds, past)
            fitting = min(smallest, max(whole_step, MIN_CHUNK_TOKENS))
        return min(room.tokens, math.floor(min(fitting, room.tokens)))

    def _admit(self, sequence: Sequence) -> bool:
        if sequence.held or not self._make_place(sequence):
            return False
        admission = self._cache.admit(sequence.blocks, spare_blocks=self._spare_blocks(sequence))
        if admission is not Admission.ADMITTED:
            return False
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.state = SequenceState.RUNNING
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.blocks.computed
            sequence.queue_seconds = self._clock() - sequence.arrival_seconds
        return True

    def _spare_blocks(self, sequence: Sequence) -> int:
        """Return how many blocks stay free beside a prompt: one for each answer that grows."""
        return len(self.running)

    def _make_place(self, sequence: Sequence) -> bool:
        """Whether the sequence may run beside others; a tenant with many makes place for others.

        Where all places are taken, a tenant that has two more than another is preempted, so that
        who fills all places with long answers does not keep others out.
        """
        wanted = sum(running.width for running in self.running) + sequence.width
        free = self._config.max_sequences - wanted
        if free >= 0:
            return True
        places: Counter[str] = Counter()
        for running in self.running:
            places[running.request.salt] += running.width
        tenant, most = max(places.items(), key=lambda item: item[1])
        own = places[sequence.request.salt]
        if sequence.width > 1 or most < own + 2:
            return False
        others = (running for running in self.running if running.request.salt == tenant)
        victim = max(others, key=lambda running: running.blocks.preemption_key)
        if victim.request.request_class < sequence.request.request_class:
            return False
        self.preempt(victim)
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
        """Free the memory of a running sequence, which then waits to be admitted again; what it has
        sealed is kept in the tiers, where there are any."""
        self.running.remove(sequence)
        self._cache.preempt(sequence.blocks)
        sequence.state = SequenceState.WAITING
        sequence.estimated_seconds = -math.inf
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.append(sequence)


def _is_running(sequence: Sequence) -> bool:
    return sequence.state is SequenceState.RUNNING


def step_work(chunks: Iterable[Chunk]) -> StepWork:
    """Count what the chunks compute; called before they are computed, or their blocks committed."""
    work = StepWork()
    for chunk in chunks:
        blocks = chunk.sequence.blocks
        past = blocks.layout.position(blocks.computed)
        if chunk.sequence.decoding:
            work.add_answer(past)
        else:
            work.add_prompt(chunk.num_tokens, past)
    return work

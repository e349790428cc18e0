"""Ways to schedule that others are known for, as the scheduler itself with parts of it replaced."""

import math
import statistics
from collections import defaultdict
from typing import Any

from compress.shape import BLOCK_TOKENS
from longctx.engine.scheduler import Chunk, Scheduler, SchedulerOutput, StepRoom
from longctx.engine.sequence import Sequence, SequenceState
from longctx.engine.time_shares import TimeShares
from longctx.request import RequestClass


class _WholeTime(TimeShares):
    """Lets prompts take whatever they want of the time."""

    def left(self, request_class: RequestClass) -> float:
        return math.inf


class FirstCome(Scheduler):
    """Whole prompts in the order in which they came, beside all answers that run.

    Source: the iteration-level scheduling of Orca, without chunks.
    """

    def __init__(self, *parts: Any, **options: Any) -> None:
        super().__init__(*parts, **options)
        self._shares = _WholeTime()

    def _queues(self) -> dict[RequestClass, list[Sequence]]:
        prompts = (each for each in (*self.running, *self.waiting) if not each.decoding)
        return {RequestClass.INTERACTIVE: sorted(prompts, key=lambda each: each.arrival)}

    def _fitting_tokens(self, past: int, smallest: int, room: StepRoom) -> int:
        return room.tokens


class FixedChunks(FirstCome):
    """Prompts in the order in which they came, in chunks that fill each step to the same number of
    tokens. Source: SARATHI, https://arxiv.org/abs/2403.02310."""


class SkipJoinQueues(FirstCome):
    """Queues of falling priority, each with twice the quantum of the one before.

    A request joins the queue whose quantum its prompt takes, and falls to the next one when it has
    used its quantum up there; who waited long is promoted to the first. A prompt is computed whole.
    What a request has computed is kept while others go before it, and swapped in and out for
    nothing: give it a pool for all. Source: FastServe, https://arxiv.org/abs/2305.05920.
    """

    QUEUES = 12
    PROMOTED_AFTER_SECONDS = 30.0

    def __init__(self, *parts: Any, **options: Any) -> None:
        super().__init__(*parts, **options)
        self._level: dict[Sequence, int] = {}
        self._used: dict[Sequence, float] = {}
        self._idle_since: dict[Sequence, float] = {}

    def _quantum(self, level: int) -> float:
        return float(self._target_seconds * 2**level)

    def schedule(self) -> SchedulerOutput:
        """Choose the requests of the highest queues, as many as may run at once."""
        now = self._clock()
        for sequence in (*self.running, *self.waiting):
            if sequence not in self._level:
                seconds = self.cost.chunk_seconds(sequence.blocks.remaining, 0)
                levels = (level for level in range(self.QUEUES) if seconds <= self._quantum(level))
                self._enter(sequence, next(levels, self.QUEUES - 1), now)
            elif now - self._idle_since[sequence] > self.PROMOTED_AFTER_SECONDS:
                self._enter(sequence, 0, now)
        everyone = sorted(
            (*self.running, *self.waiting), key=lambda each: (self._level[each], each.arrival)
        )
        chosen = everyone[: self.max_sequences]
        top = self._level[chosen[0]] if chosen else 0
        chunks: list[Chunk] = []
        left = self.batch_tokens
        for sequence in chosen:
            if not sequence.decoding and self._level[sequence] > top:
                continue  # an iteration of short requests does not wait for a long prompt
            if sequence.state is SequenceState.WAITING and not self._admit(sequence):
                continue
            tokens = 1 if sequence.decoding else sequence.blocks.remaining
            if tokens <= left and self._allocate(sequence, tokens):
                chunks.append(Chunk(sequence, tokens))
                left -= tokens
        return SchedulerOutput(tuple(chunks))

    def _enter(self, sequence: Sequence, level: int, now: float) -> None:
        self._level[sequence], self._used[sequence] = level, 0.0
        self._idle_since[sequence] = now

    def _make_place(self, sequence: Sequence) -> bool:
        return True  # `schedule` has chosen

    def update(self, output: SchedulerOutput, seconds: float) -> None:
        super().update(output, seconds)
        for chunk in output.chunks:
            self._note_use(chunk.sequence, seconds)

    def _note_use(self, sequence: Sequence, seconds: float) -> None:
        level = self._level[sequence]
        self._idle_since[sequence] = self._clock()
        self._used[sequence] += seconds
        if self._used[sequence] > self._quantum(level) and level + 1 < self.QUEUES:
            self._enter(sequence, level + 1, self._clock())

    def remove(self, sequence: Sequence) -> None:
        super().remove(sequence)
        for table in (self._level, self._used, self._idle_since):
            table.pop(sequence, None)


class PredictedLengths(Scheduler):
    """The scheduler, but a request is admitted only where its whole answer is likely to have room.

    The length of an answer is predicted from those to prompts of the same form, which is the first
    token here: their mean, and as much more as they differ. A wrong guess costs a preemption.
    Source: S^3, https://arxiv.org/abs/2306.06000, which learns a classifier instead.
    """

    def __init__(self, *parts: Any, **options: Any) -> None:
        super().__init__(*parts, **options)
        self._lengths: dict[int, list[int]] = defaultdict(list)

    def _blocks_to_come(self, sequence: Sequence) -> int:
        known = self._lengths[form_of(sequence)][-100:]
        if not known or sequence.request.sampling.max_tokens == 0:
            return 1
        predicted = statistics.fmean(known) + statistics.pstdev(known)
        return 1 + math.ceil(max(0.0, predicted - sequence.completion_tokens) / BLOCK_TOKENS)

    def _spare_blocks(self, sequence: Sequence) -> int:
        return sum(map(self._blocks_to_come, (*self.running, sequence)))

    def remove(self, sequence: Sequence) -> None:
        if sequence.state is not SequenceState.FINISHED:
            self._lengths[form_of(sequence)].append(sequence.completion_tokens)
        super().remove(sequence)


def form_of(sequence: Sequence) -> int:
    """Return which prompts are alike, as the trace says."""
    ((form,),) = (segment.token_ids for segment in sequence.request.segments)
    return form

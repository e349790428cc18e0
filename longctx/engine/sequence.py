"""Says how far a request has come: there is one `Sequence` for each of its choices."""

import math
from dataclasses import dataclass, replace
from enum import Enum

from longctx.engine.sampler import SamplingState
from longctx.kv.sequence_blocks import SequenceBlocks
from longctx.request import FinishReason, Request, RequestClass
from longctx.text.detokenizer import TextStream


class SequenceState(Enum):
    """Where a sequence is: it waits, runs, may be preempted to wait again, and finishes once."""

    WAITING = "waiting"  # holds no memory; also after a preemption
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request: what was asked, how its answer is sampled, and how far it is.

    While fewer than all tokens but the last are computed it is in prefill; a decoding sequence has
    exactly one token that is not computed, the one sampled last. Only the engine's thread touches
    it. Two sequences compare by identity.
    """

    request: Request
    index: int  # which of the request's choices
    arrival: int  # order of submission; never changes, so preemption has a total order
    arrival_seconds: float
    sampling_state: SamplingState
    seed: int
    text: TextStream
    blocks: SequenceBlocks
    max_tokens: int  # of its answer
    linked_tokens: int = 0  # of the parts that it reuses, those computed in context
    state: SequenceState = SequenceState.WAITING
    cached_tokens: int | None = None  # prompt tokens that were found when it was first admitted
    queue_seconds: float | None = None  # how long it waited until it was first admitted
    reached_tokens: int = 0  # the most that was computed or found at once, preempted or not
    computed_tokens: int = 0  # tokens really computed, again after preemptions too
    preemptions: int = 0
    forked: bool = False  # the request's other choices have parted from it
    finish_reason: FinishReason | None = None
    expected_tokens: int = 0  # while it waits: tokens that others have computed, as estimated
    estimated_seconds: float = -math.inf  # when that was
    held: bool = False  # its grammar is not compiled yet: it may not be admitted

    @property
    def decoding(self) -> bool:
        """Whether its prompt is computed and only the token sampled last is not."""
        return self.blocks.computed >= self.blocks.prompt_tokens and self.blocks.remaining == 1

    @property
    def completion_tokens(self) -> int:
        """Tokens that were sampled so far."""
        return len(self.blocks.tokens) - self.blocks.prompt_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are still to be told."""
        return self.blocks.fresh_from is not None

    @property
    def width(self) -> int:
        """Sequences that this one is or will become, since choices fork at the first token.

        With `n` = 4 the first choice counts as 4 until it has forked, then each counts as 1.
        """
        return 1 if self.index or self.forked else self.request.sampling.n

    def note_scored(self) -> None:
        """Note that the prompt is scored as far as it is computed: caches may provide that now."""
        blocks = self.blocks
        if blocks.fresh_from is not None:
            done = blocks.computed >= blocks.prompt_tokens
            blocks.fresh_from = None if done else max(blocks.fresh_from, blocks.computed)

    def prioritize(self, request_class: RequestClass) -> None:
        """Serve it in this class from now on, if that is a more urgent one than its own."""
        if request_class < self.request.request_class:
            self.request = replace(self.request, request_class=request_class)
            self.blocks.preemption_key = preemption_key(self.request, self.arrival, self.index)

    def fork(self, index: int, text: TextStream) -> "Sequence":
        """Make another choice of the request, which continues from this one's tokens."""
        return Sequence(
            request=self.request,
            index=index,
            arrival=self.arrival,
            arrival_seconds=self.arrival_seconds,
            sampling_state=self.sampling_state.fork(self.seed + index),
            seed=self.seed + index,
            text=text,
            blocks=self.blocks.fork(preemption_key(self.request, self.arrival, index)),
            max_tokens=self.max_tokens,
            linked_tokens=self.linked_tokens,
            cached_tokens=self.cached_tokens,
        )


def preemption_key(request: Request, arrival: int, index: int) -> tuple[int, int, int]:
    """Return the preemption priority; lower is kept. A total order: no two preempt in turn."""
    return (request.request_class, arrival, index)

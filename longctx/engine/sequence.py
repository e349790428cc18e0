"""How far a request has come: one `Sequence` for each of its choices."""

from dataclasses import dataclass, replace
from enum import Enum

from longctx.engine.sampler import SamplingState
from longctx.kv.sequence_blocks import SequenceBlocks
from longctx.request import FinishReason, Request, RequestClass
from longctx.text.detokenizer import TextStream


class SequenceState(Enum):
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
    sampling: SamplingState
    seed: int
    text: TextStream
    blocks: SequenceBlocks
    linked_tokens: int = 0  # of what it borrows: computed in context all the same
    state: SequenceState = SequenceState.WAITING
    cached_tokens: int | None = None  # prompt tokens that were found when it was first admitted
    computed_tokens: int = 0  # tokens really computed, again after preemptions too
    preemptions: int = 0
    forked: bool = False  # the request's other choices have parted from it
    finish_reason: FinishReason | None = None

    @property
    def decoding(self) -> bool:
        """Its prompt is computed and one sampled token is not: each step computes that one."""
        return self.blocks.computed >= self.blocks.prompt_tokens and self.blocks.remaining == 1

    @property
    def completion_tokens(self) -> int:
        return len(self.blocks.tokens) - self.blocks.prompt_tokens

    @property
    def width(self) -> int:
        """Sequences that this one is or is about to become: choices fork at the first token."""
        return 1 if self.index or self.forked else self.request.sampling.n

    def prioritize(self, request_class: RequestClass) -> None:
        """Serve it in this class from now on, if that is a more urgent one than its own."""
        if request_class < self.request.request_class:
            self.request = replace(self.request, request_class=request_class)
            self.blocks.preemption_key = preemption_key(self.request, self.arrival, self.index)

    def fork(self, index: int, text: TextStream) -> "Sequence":
        """Another choice of the request, which continues from this one's tokens."""
        return Sequence(
            request=self.request,
            index=index,
            arrival=self.arrival,
            arrival_seconds=self.arrival_seconds,
            sampling=self.sampling.fork(self.seed + index),
            seed=self.seed + index,
            text=text,
            blocks=self.blocks.fork(preemption_key(self.request, self.arrival, index)),
            linked_tokens=self.linked_tokens,
            cached_tokens=self.cached_tokens,
        )


def preemption_key(request: Request, arrival: int, index: int) -> tuple[int, int, int]:
    """Preemption priority; lower is kept. A total order: two sequences never preempt in turn."""
    return (request.request_class, arrival, index)

"""Follows one request in the engine: its choices, the progress last reported, its usage."""

import time
from dataclasses import dataclass, field

from longctx.engine.cost_model import CostModel
from longctx.engine.sequence import Sequence
from longctx.kv.cache_manager import KVCacheManager
from longctx.request import Progress, Request, RequestOutput, TokenSource, Usage
from offload.tier_names import TIERS


@dataclass(slots=True)
class RequestState:
    """A request that has been submitted and has not ended, with the sequences of its choices.

    `sequences[0]` is the first choice, which computes the prompt; the others are added when they
    fork from it. `open_choices` counts those that have not ended, those not forked yet included.
    """

    request: Request
    sequences: list[Sequence]
    internal: bool = False  # the engine's own: it has no caller, and no outputs
    reported_tokens: int | None = None  # prompt tokens in the last progress, if there was one
    open_choices: int = field(init=False)

    def __post_init__(self) -> None:
        self.open_choices = self.request.sampling.n

    def progress(self, cache: KVCacheManager, cost: CostModel) -> list[RequestOutput]:
        """Return one progress output if more of the prompt is computed than was reported last.

        While the sequence waits for blocks that another one computes, it is the other's progress.
        The rest is expected to go at the pace so far, each token costing what the cost model says.
        """
        first = self.sequences[0]
        owner = cache.computed_by(first.blocks)
        done = min(first.blocks.prompt_tokens, (owner or first.blocks).computed)
        if self.internal or first.completion_tokens:
            return []
        if self.reported_tokens is not None and done <= self.reported_tokens:
            return []
        self.reported_tokens = done
        total = first.blocks.prompt_tokens + first.blocks.reused_tokens
        admitted = first.cached_tokens is not None
        reused = first.blocks.reused_tokens if admitted else 0  # before, it may still wait for them
        time_ms = 1000 * (time.monotonic() - first.arrival_seconds)
        cached = first.cached_tokens or 0
        spent = cost.chunk_seconds(done - cached, cached)
        rest = cost.chunk_seconds(first.blocks.prompt_tokens - done, done)
        progress = Progress(
            total=total,
            cache=cached + reused,
            processed=done + reused,
            time_ms=time_ms,
            rest_ms=time_ms * rest / spent if spent > 0 else None,
        )
        return [RequestOutput(request_id=self.request.request_id, progress=progress)]

    def _by_source(self) -> dict[TokenSource, int]:
        """Say where each token of the prompt came from; together these are all of its tokens."""
        first = self.sequences[0]
        blocks = first.blocks
        found = dict.fromkeys(TIERS, 0) if blocks.found_tokens is None else blocks.found_tokens
        total = blocks.prompt_tokens + blocks.reused_tokens
        reached = min(first.reached_tokens, blocks.prompt_tokens) + blocks.reused_tokens
        computed = max(0, reached - sum(found.values()))
        counts: dict[TokenSource, int] = {"computed": computed}
        for tier, tokens in found.items():
            counts[tier] = tokens
        counts["none"] = total - computed - sum(found.values())
        return counts

    def usage(self) -> Usage:
        """Count the tokens of all choices so far; the prompt's are those of the first one."""
        first = self.sequences[0]
        reused = first.blocks.reused_tokens
        found = None if first.cached_tokens is None else first.cached_tokens + reused
        return Usage(
            prompt_tokens=first.blocks.prompt_tokens + reused,
            cached_tokens=found or 0,
            completion_tokens=sum(sequence.completion_tokens for sequence in self.sequences),
            computed_tokens=sum(sequence.computed_tokens for sequence in self.sequences),
            reused_tokens=reused if found is not None else 0,
            linked_tokens=first.linked_tokens,
            tokens_by_source=self._by_source(),
            queue_seconds=first.queue_seconds,
            explanation=None if first.blocks.trace is None else first.blocks.trace.explanation,
        )

"""One request in the engine: its choices, what its caller was told last, and what it came to."""

import time
from dataclasses import dataclass, field

from longctx.kv_cache import KVCacheManager
from longctx.request import Progress, Request, RequestOutput, Usage
from longctx.sequence import Sequence


@dataclass(slots=True)
class Answers:
    request: Request
    sequences: list[Sequence]
    reported: int = -1  # prompt tokens in the last progress
    open_choices: int = field(init=False)

    def __post_init__(self) -> None:
        self.open_choices = self.request.sampling.n

    def progress(self, cache: KVCacheManager) -> list[RequestOutput]:
        """News of the prompt, if there are any: computed by its own sequence or by another's."""
        first = self.sequences[0]
        owner = cache.computed_by(first)
        done = min(first.prompt_tokens, (owner or first).computed)
        if first.completion_tokens or done <= self.reported:
            return []
        self.reported = done
        progress = Progress(
            total=first.prompt_tokens,
            cache=first.cached_tokens or 0,
            processed=done,
            time_ms=1000 * (time.monotonic() - first.arrival_seconds),
        )
        return [RequestOutput(request_id=self.request.request_id, progress=progress)]

    def usage(self) -> Usage:
        first = self.sequences[0]
        return Usage(
            prompt_tokens=first.prompt_tokens,
            cached_tokens=first.cached_tokens or 0,
            completion_tokens=sum(sequence.completion_tokens for sequence in self.sequences),
            computed_tokens=sum(sequence.computed_tokens for sequence in self.sequences),
            explanation=None if first.trace is None else first.trace.explanation,
        )

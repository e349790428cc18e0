"""Outputs of answers that nobody reads as they are made, told a few times a second.

Each output that leaves the engine's process wakes the server, which has to have a part of a core
for it. Where the answer is given whole, all of that is for nothing but the times in its metrics.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from longctx.process.output_queue import joined
from longctx.request import Request, RequestOutput

HELD_SECONDS = 0.1


@dataclass(slots=True)
class _Held:
    """What waits of one request, by choice, and when something of it was told last."""

    runs: dict[int, list[RequestOutput]] = field(default_factory=dict)
    told: float | None = None

    def take(self, output: RequestOutput, now: float) -> list[RequestOutput]:
        """Return what is to be told now that this output has come."""
        if output.progress is not None or output.prompt_logprobs:
            return [*self._all(), output]
        self.runs.setdefault(output.index, []).append(output)
        if output.finish_reason is not None:
            return [joined(self.runs.pop(output.index))]
        if self.told is not None and now - self.told < HELD_SECONDS:
            return []
        self.told = now  # the first token at once
        return self._all()

    def _all(self) -> list[RequestOutput]:
        runs, self.runs = self.runs, {}
        return [joined(run) for run in runs.values()]


class HeldOutputs:
    """Stands between an engine and its server, and holds what is not `streamed`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests: dict[str, _Held] = {}

    def begin(self, request: Request) -> None:
        """Hold the outputs of a request that was submitted, if it lets them be held."""
        if not request.streamed:
            self._requests[request.request_id] = _Held()

    def drop(self, request_id: str) -> None:
        """Forget a request that is aborted."""
        self._requests.pop(request_id, None)

    def pass_on(self, outputs: Sequence[RequestOutput]) -> Iterable[RequestOutput]:
        """Return what is to be told after a step with these outputs."""
        if not self._requests:
            return outputs
        now = self._clock()
        passed: list[RequestOutput] = []
        for output in outputs:
            held = self._requests.get(output.request_id)
            passed += [output] if held is None else held.take(output, now)
            if output.finished:
                self.drop(output.request_id)
        return passed

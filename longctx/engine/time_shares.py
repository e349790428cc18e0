"""Says how long prompt chunks may take: beside answers their share, and without answers as long as
it is worth to let those wait who may come."""

import math

from longctx.request import RequestClass

# The part of the time that prompt chunks of a class may take while sequences decode: beside an
# ingestion an answer takes about a tenth longer, beside questions less than four times its time.
TIME_SHARE = {RequestClass.INTERACTIVE: 0.7, RequestClass.BATCH: 0.4, RequestClass.INGEST: 0.1}

# A step in which nothing decodes may take so many times the objective: the first just after
# somebody was there, the second where nobody was there for long.
LEAST_LONE_STEPS, MOST_LONE_STEPS = 1.0, 12.0
# What a second of the machine counts in seconds that somebody waits.
MACHINE_WEIGHT = 2.0


class LoneSteps:
    """Says how long a step may take in which nothing decodes.

    Each step costs a fixed time, whatever it computes: where steps take `s` seconds, `fixed / s` of
    the machine's time. Who comes during one waits for half of it. Where nobody was there for
    `quiet` seconds, somebody is likely to come once in about so many, so `s / (2 * quiet)` seconds
    are waited for each that passes. Both together, the machine's weighed, are least at
    `s = sqrt(2 * weight * fixed * quiet)`: a machine with a fixed time of 20 ms takes 0.25 s in
    the first second after an answer has ended, 1 s after 12 seconds, and 3 s from two minutes on.
    """

    def __init__(self, target_seconds: float, now: float) -> None:
        self._least = LEAST_LONE_STEPS * target_seconds
        self._most = MOST_LONE_STEPS * target_seconds
        self._last = now

    def disturb(self, now: float) -> None:
        """Note that somebody waits for an answer, or for its next token."""
        self._last = now

    def seconds(self, now: float, fixed_seconds: float) -> float:
        """Return the longest time of a step that costs `fixed_seconds` whatever it computes."""
        best = math.sqrt(2 * MACHINE_WEIGHT * fixed_seconds * max(0.0, now - self._last))
        return min(self._most, max(self._least, best))


class TimeShares:
    """Holds for each class the seconds that its chunks may take of the next step.

    Each step with answers gives a class `share / (1 - share)` of what the answers and the chunks of
    other classes take, and takes what its own took. A class that has nothing left gets no chunk.
    What is given is not saved up: a class never has more than one step gives, so that a prompt that
    comes late does not make one step long. A step in which nothing decodes gives all of its time to
    those that owe.

    An ingestion has the share 0.1, and answers alone take 60 ms a step, which gives it 7 ms. Its
    smallest chunk takes 100 ms, so 93 ms are owed, which the next 14 steps repay; then comes
    another chunk. It has taken 100 ms of the 1,000 that went by, a tenth.

    The scheduler calls `begin` and `left` before each step with answers and `record` after it, and
    `repay` after each step without, in the engine's thread.
    """

    def __init__(self) -> None:
        self._left = dict.fromkeys(RequestClass, 0.0)

    def left(self, request_class: RequestClass) -> float:
        """Seconds that chunks of the class may take of the next step; where owed, negative."""
        return self._left[request_class]

    def begin(self, answer_seconds: float) -> None:
        """Give each class its share beside answers that take so long in the step to come."""
        for request_class, share in TIME_SHARE.items():
            given = answer_seconds * share / (1 - share)
            self._left[request_class] = min(given, self._left[request_class] + given)

    def record(self, seconds_of: dict[RequestClass, float]) -> None:
        """Take what the chunks of each class took of a step beside answers, and give the others
        their share of it."""
        total = sum(seconds_of.values())
        for request_class, share in TIME_SHARE.items():
            own = seconds_of.get(request_class, 0.0)
            self._left[request_class] += (total - own) * share / (1 - share) - own

    def repay(self, seconds: float) -> None:
        """Forgive as much of what is owed: so long nobody waited for an answer's next token."""
        self._left = {
            each: max(left, min(0.0, left + seconds)) for each, left in self._left.items()
        }

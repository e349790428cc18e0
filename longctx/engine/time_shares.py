"""Keeps prompt chunks to their share of the time while answers are written."""

from longctx.request import RequestClass

# The part of the time that prompt chunks of a class may take while sequences decode: beside an
# ingestion an answer takes less than twice its time, beside questions less than four times.
TIME_SHARE = {RequestClass.INTERACTIVE: 0.75, RequestClass.BATCH: 0.45, RequestClass.INGEST: 0.45}


class TimeShares:
    """Holds for each class the seconds that its chunks may take of the next step.

    Each step with answers gives a class `share / (1 - share)` of what the answers alone take, and
    takes what the chunks of the class took. A class that has nothing left gets no chunk. What is
    given is not saved up: a class never has more than one step gives, so that a prompt that comes
    late does not make one step long. A step in which nothing decodes gives all of its time to those
    that owe.

    An ingestion has the share 0.45, and answers alone take 60 ms a step, which gives it 49 ms. Its
    smallest chunk takes 100 ms, so 51 ms are owed; the next step gives 49 and has no chunk, the one
    after it gives 49 and has one. Steps take 160 and 60 ms by turns. A chunk of 2 s, late in a long
    document, is followed by 40 steps without one.

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
        """Take what the chunks of each class took of a step, beside answers."""
        for request_class, seconds in seconds_of.items():
            self._left[request_class] -= seconds

    def repay(self, seconds: float) -> None:
        """Forgive as much of what is owed: so long nobody waited for an answer's next token."""
        self._left = {
            each: max(left, min(0.0, left + seconds)) for each, left in self._left.items()
        }

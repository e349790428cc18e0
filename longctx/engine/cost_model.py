"""Predicts how long a step takes from what it computes, as measured from the steps so far.

A step costs a fixed time (the weights are read once), a time for each prompt token, one for each
pair of a prompt token and a token that it sees, one for each answer that decodes, and one for each
token of those answers' contexts:

    seconds = step + token * C + pair * C * (p + C / 2) + answer * n + context * sum(contexts)

The scheduler solves it for C, so prompt chunks shrink as the context before them grows.
"""

import math
import os
import tempfile
from collections import OrderedDict, deque
from dataclasses import astuple, dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

BUCKETS = 256  # kinds of steps that are remembered; the one not seen for longest is forgotten
RECENT = 9  # measurements that each kind keeps: their median stands for all
EARLY_KINDS = 16  # until so many are known, each new one is fitted at once
REFIT_STEPS = 16


@dataclass(slots=True)
class StepWork:
    """Counts what one step computes, in the terms of the cost model."""

    prompt_tokens: int = 0
    prompt_pairs: float = 0.0  # a prompt token and a token that it sees
    answers: int = 0
    context_tokens: int = 0  # of all answers together

    def add_prompt(self, tokens: int, past: int) -> None:
        """Count a chunk of so many prompt tokens after `past` tokens of the same prompt."""
        self.prompt_tokens += tokens
        self.prompt_pairs += tokens * (past + tokens / 2)

    def add_answer(self, context: int) -> None:
        """Count a decoded token that sees `context` tokens."""
        self.answers += 1
        self.context_tokens += context

    @property
    def terms(self) -> NDArray[np.float64]:
        """The values that the coefficients are multiplied with, [5]."""
        work = (self.prompt_tokens, self.prompt_pairs, self.answers, self.context_tokens)
        return np.array([1.0, *work])

    @property
    def kind(self) -> tuple[int, ...]:
        """Steps of one kind cost about the same: their work is equal up to a factor of two."""
        return tuple(int(term).bit_length() for term in self.terms[1:])


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Seconds for each unit of work; all are at least 0."""

    step: float = 0.0
    token: float = 0.0
    pair: float = 0.0
    answer: float = 0.0
    context: float = 0.0


class _Kind:
    """Keeps the last measurements of steps of one kind; `row` is their median, over its seconds.

    Whatever a few outliers are, the median is none of them. Divided by what was measured, each row
    asks for 1, so that errors are relative.
    """

    def __init__(self) -> None:
        self._measured: deque[tuple[float, NDArray[np.float64]]] = deque(maxlen=RECENT)
        self.row: NDArray[np.float64] = np.empty(0)

    @property
    def weight(self) -> float:
        """How much the row counts: the median of few measurements is further off."""
        return math.sqrt(len(self._measured))

    def add(self, terms: NDArray[np.float64], seconds: float) -> None:
        self._measured.append((seconds, terms))
        order = sorted(self._measured, key=lambda measured: measured[0])
        median, terms = order[(len(order) - 1) // 2]
        self.row = terms / median


class CostModel:
    """Learns the cost of steps: `observe` each one, then `seconds` and `chunk_tokens` answer.

    Each kind of step counts by the median of its last measurements, and the more the more of them
    there are, up to nine. So ten thousand steps that only decode do not make it forget what a
    prompt chunk costs, and a step during which the machine did something else hardly counts. Errors
    are relative: a step of 2 ms and one of 2 s weigh alike. Only the scheduler's thread uses it.

    With a `path` it begins with what an earlier one has saved there, and `save` keeps what it
    knows; the path has to name all that the cost depends on.
    """

    def __init__(
        self, coefficients: Coefficients | None = None, *, path: Path | None = None
    ) -> None:
        self._path = path
        saved = coefficients or _saved(path)
        self.coefficients = saved or Coefficients()
        self.known = saved is not None
        self._kinds: OrderedDict[tuple[int, ...], _Kind] = OrderedDict()
        self._unfitted = 0
        self._errors: deque[float] = deque(maxlen=128)

    @property
    def knows_prompts(self) -> bool:
        """Whether a prompt chunk was ever measured, here or before a restart."""
        return self.coefficients.token > 0 or self.coefficients.pair > 0

    @property
    def median_error(self) -> float | None:
        """How far predictions were off in the middle, as a part of what was measured."""
        return float(np.median(self._errors)) if self._errors else None

    def seconds(self, work: StepWork) -> float:
        """How long a step with this work is likely to take."""
        per = self.coefficients  # by hand: asked for each chunk of each step
        return (
            per.step
            + per.token * work.prompt_tokens
            + per.pair * work.prompt_pairs
            + per.answer * work.answers
            + per.context * work.context_tokens
        )

    def chunk_seconds(self, tokens: int, past: int) -> float:
        """What a chunk of so many tokens after `past` others adds to a step."""
        per = self.coefficients
        return per.token * tokens + per.pair * tokens * (past + tokens / 2)

    def chunk_tokens(self, seconds: float, past: int) -> float:
        """The longest chunk after `past` tokens that adds no more than `seconds` to a step.

        The positive root of `pair / 2 * C^2 + (token + pair * past) * C = seconds`, in the form
        that stays exact where `pair` is tiny.
        """
        per = self.coefficients
        slope = per.token + per.pair * past
        if seconds <= 0:
            return 0.0
        if slope == 0 and per.pair == 0:
            return math.inf
        return 2 * seconds / (slope + math.sqrt(slope * slope + 2 * per.pair * seconds))

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learn from a step that has run."""
        if self.known:
            self._errors.append(abs(self.seconds(work) - seconds) / seconds)
        new = work.kind not in self._kinds
        kind = self._kinds.setdefault(work.kind, _Kind())
        self._kinds.move_to_end(work.kind)
        if len(self._kinds) > BUCKETS:
            self._kinds.popitem(last=False)
        kind.add(work.terms, seconds)
        self._unfitted += 1
        if (new and len(self._kinds) <= EARLY_KINDS) or self._unfitted >= REFIT_STEPS:
            self._fit()

    def save(self) -> None:
        """Keep what was learned for the next start; where it cannot be written, it is not kept."""
        if self._path is None or not self._kinds:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._path.parent, delete=False) as file:
                file.write(msgspec.json.encode(self.coefficients))
            os.replace(file.name, self._path)  # two servers may end at once
        except OSError:
            return

    def _fit(self) -> None:
        rows = np.array([kind.row for kind in self._kinds.values()])
        measured = rows.max(axis=0) > 0
        # What was not measured yet stays as it was known before.
        before = np.array(astuple(self.coefficients))
        rest = 1.0 - rows @ np.where(measured, 0.0, before)
        weights = np.array([kind.weight for kind in self._kinds.values()])
        before[measured] = _solve(rows[:, measured] * weights[:, None], rest * weights)
        self.coefficients = Coefficients(*before.tolist())
        self.known, self._unfitted = True, 0


def _saved(path: Path | None) -> Coefficients | None:
    """Return what was saved; None where nothing readable is there."""
    try:
        if path is None:
            return None
        found = msgspec.json.decode(path.read_bytes(), type=Coefficients)
    except (OSError, msgspec.DecodeError):
        return None
    whole = all(math.isfinite(value) and value >= 0 for value in astuple(found))
    return found if whole else None


def _solve(rows: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares without negative coefficients: the most negative one is left out, and again."""
    rows = rows / (scale := rows.max(axis=0))
    solution = np.zeros(len(scale))
    used = np.arange(len(scale))
    while len(used):
        found = np.linalg.lstsq(rows[:, used], wanted, rcond=1e-9)[0]
        if found.min() >= 0:
            solution[used] = found
            break
        used = np.delete(used, found.argmin())
    coefficients: NDArray[np.float64] = solution / scale
    return coefficients

"""What a needle grid came to: who found what, in which cell, and how that differs from `raw`."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from longctx.bench.scores import mcnemar, wilson

Place = tuple[int, int, int, int]  # length, seed, number of the document, number of the question
LEAST_SHARE = 0.5  # a cell of which the exact model finds less tells nothing of a codec
FLOOR = 1e-7  # of a probability: logs are kept to seven digits


@dataclass(frozen=True, slots=True)
class Variant:
    """How the cache held the documents that were asked."""

    codec: str
    cache: str

    def __str__(self) -> str:
        return f"{self.codec} {self.cache}"


@dataclass(frozen=True, slots=True)
class Cell:
    """What the questions of one length and depth came to."""

    asked: int
    right: int

    @property
    def share(self) -> float:
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.asked)


@dataclass(slots=True)
class Reading:
    """What it took to read and ask the documents of one length."""

    documents: int = 0
    tokens: int = 0
    seconds: float = 0.0
    found_tokens: list[int] = field(default_factory=list)  # of each document, in the cache already
    cached_tokens: list[int] = field(default_factory=list)  # per question
    computed_tokens: list[int] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Grid:
    """The answers of one variant, by place."""

    answers: Mapping[Place, Mapping[str, Any]]
    readings: Mapping[int, Reading]  # by length

    def cell(self, length: int | None = None, depth: float | None = None) -> Cell:
        """Return what the answers at a length and depth came to; of all, without."""
        found = [
            bool(answer["right"])
            for place, answer in self.answers.items()
            if length in (None, place[0]) and depth in (None, answer["depth"])
        ]
        return Cell(len(found), sum(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How the same questions came out in another variant.

    `kl` is a lower bound in nats per token: along what both said alike, over the likeliest tokens
    that both named and one more for all others. `flips` is the share of these places where the
    likeliest token differs, which ends the comparison of an answer.
    """

    asked: int
    lost: int
    gained: int
    changed: int  # answers that are not the same text
    places: int
    kl: float
    flips: float

    @property
    def share(self) -> float:
        return (self.gained - self.lost) / self.asked

    @property
    def p(self) -> float:
        return mcnemar(self.lost, self.gained)


def difference(base: Grid, other: Grid) -> Difference:
    """Compare the answers to the same questions; both must have been asked all."""
    pairs = [(answer, other.answers[place]) for place, answer in base.answers.items()]
    places = [place for before, after in pairs for place in _places(before, after)]
    return Difference(
        asked=len(pairs),
        lost=sum(before["right"] and not after["right"] for before, after in pairs),
        gained=sum(after["right"] and not before["right"] for before, after in pairs),
        changed=sum(before["given"] != after["given"] for before, after in pairs),
        places=len(places),
        kl=sum(kl for kl, _ in places) / len(places) if places else 0.0,
        flips=sum(flip for _, flip in places) / len(places) if places else 0.0,
    )


def told_logprobs(likeliest: Iterable[Sequence[tuple[int, float]]]) -> list[list[list[float]]]:
    """Return the likeliest tokens of each place as a record keeps them."""
    return [[[token, round(logprob, 7)] for token, logprob in place] for place in likeliest]


def _places(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[float, bool]]:
    """Yield (KL, flipped) of each place until the likeliest token is another."""
    for first, second in zip(before["likeliest"], after["likeliest"], strict=False):
        flipped = first[0][0] != second[0][0]
        yield _divergence(dict(first), dict(second)), flipped
        if flipped:
            return


def _divergence(first: Mapping[int, float], second: Mapping[int, float]) -> float:
    """Return KL(first || second) over the tokens that both name, and one for all others."""
    shared = first.keys() & second.keys()
    one, other = ([*(math.exp(logs[token]) for token in shared)] for logs in (first, second))
    one.append(max(FLOOR, 1 - sum(one)))
    other.append(max(FLOOR, 1 - sum(other)))
    total = sum(a * math.log(a / b) for a, b in zip(one, other, strict=True))
    return max(0.0, total)

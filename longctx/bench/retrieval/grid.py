"""What a needle grid came to: who found what, in which cell."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from longctx.needles.scores import wilson

Place = tuple[int, int, int, int]  # length, seed, number of the document, number of the question
LEAST_SHARE = 0.5  # a cell of which the exact model finds less tells nothing of a codec


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

    def at(
        self, length: int | None = None, depth: float | None = None
    ) -> dict[Place, Mapping[str, Any]]:
        """Return the answers at a length and depth; all, without."""
        return {
            place: answer
            for place, answer in self.answers.items()
            if length in (None, place[0]) and depth in (None, answer["depth"])
        }

    def cell(self, length: int | None = None, depth: float | None = None) -> Cell:
        """Return what the answers at a length and depth came to; of all, without."""
        found = [bool(answer["right"]) for answer in self.at(length, depth).values()]
        return Cell(len(found), sum(found))

    def most_missed_tokens(self, length: int | None = None) -> int:
        """Return how far from the wanted token a needle of that length begins, at most."""
        return max(
            abs(int(answer["begin_token"]) - int(answer["wanted_token"]))
            for answer in self.at(length).values()
        )

"""Documents with needles in them, by length and depth, from words that no training has seen.

Reading a document costs far more than asking about it, so one document carries as many needles as
it can without becoming a list of them, and is read once.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from longctx.needles.generator import Needle, distractors, haystack, needle
from longctx.needles.placing import STOPS, Tokens, nearest_ends, put
from longctx.needles.ruler_tasks import Draft, Sentences, fit

TOKENS_PER_NEEDLE = 128  # of document for each statement in it: mostly filler, at any length
FRAME_TOKENS = 8  # spaces and seams between filler and statements


@dataclass(frozen=True, slots=True)
class Planted:
    """A needle in a document; its reach is told in tokens of the whole text."""

    needle: Needle
    depth: float  # percent, of the cell that it counts for
    begin_token: int  # how many tokens of the document come before its statement
    wanted_token: int  # how many should


@dataclass(frozen=True, slots=True)
class Haystack:
    text: str
    planted: tuple[Planted, ...]


def haystacks(
    length: int,
    depths: Sequence[float],
    *,
    questions: int,
    kind: str,
    distractor_count: int,
    seed: int,
    tokenizer: Tokens,
    sentences: Sentences | None = None,
) -> Iterator[Haystack]:
    """Returns documents of at most `length` tokens, with `questions` needles per depth in all.

    Filler is generated prose, or the `sentences` that somebody else draws. Each needle begins at
    the sentence end whose share of tokens is nearest to its depth.
    """
    wanted = [depth for _ in range(questions) for depth in depths]
    room = max(1, length // (TOKENS_PER_NEEDLE * (1 + distractor_count)))
    for number, begin in enumerate(range(0, len(wanted), room)):
        rng = random.Random(f"haystack {seed} {length} {number}")
        yield _haystack(
            wanted[begin : begin + room],
            depths,
            kind,
            distractor_count,
            length,
            rng,
            tokenizer,
            sentences,
        )


def document(tokens: int, *, seed: int, count_tokens: Callable[[str], int]) -> str:
    """Returns filler of at most `tokens` tokens, counted in the whole text."""
    budget = tokens
    while True:
        text = haystack(budget, seed=seed, count_tokens=count_tokens)
        # Seams between sentences may cost tokens that no sentence has alone
        excess = count_tokens(text) - tokens
        if excess <= 0:
            return text
        budget -= excess


def _joined(
    sentences: Sentences, seed: int, tokens: int, count_tokens: Callable[[str], int]
) -> str:
    """Returns as many sentences as there may be, one after another.

    What ends without a full stop, such as a heading, ends a line: needles stand between them.
    """

    def build(units: int) -> str:
        drawn = sentences(random.Random(seed), units)
        return "".join(each + (" " if each[-1:] in STOPS else "\n") for each in drawn).rstrip()

    text = Draft(build=build, least=0, most=None, answers=(), answer_prefix="")
    return fit(text, tokens, count_tokens)


def _haystack(
    cells: Sequence[float],
    depths: Sequence[float],
    kind: str,
    distractor_count: int,
    length: int,
    rng: random.Random,
    tokenizer: Tokens,
    sentences: Sentences | None,
) -> Haystack:
    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text))

    exact = _spread(cells, depths)
    drawn: list[tuple[float, Needle, float | None]] = []  # place, needle, cell unless it is false
    keys: set[tuple[str, str]] = set()
    asked = 0
    while asked < len(cells):
        target = needle(rng.getrandbits(48), kind=kind)
        others = distractors(target, distractor_count, rng.getrandbits(48))
        names = {(each.attribute, each.key) for each in (target, *others)}
        if names & keys:
            continue  # two answers to one question
        keys |= names
        drawn.append((exact[asked], target, cells[asked]))
        drawn += [(rng.random(), other, None) for other in others]
        asked += 1
    rising = sorted(range(len(drawn)), key=lambda number: drawn[number][0])
    statements = [drawn[number][1].statement for number in rising]
    places = [drawn[number][0] for number in rising]
    used = sum(count_tokens(statement) for statement in statements) + FRAME_TOKENS
    budget, filler_seed = length - used, rng.getrandbits(48)
    while True:
        if sentences is None:
            filler = document(budget, seed=filler_seed, count_tokens=count_tokens)
        else:
            filler = _joined(sentences, filler_seed, budget, count_tokens)
        text, begins = put(filler, statements, nearest_ends(filler, statements, places, tokenizer))
        ends = tokenizer.token_ends(text)
        excess = len(ends) - length
        if excess <= 0:
            break
        budget -= excess
    planted: dict[int, Planted] = {}
    for number, begin in zip(rising, begins, strict=True):
        place, fact, cell = drawn[number]
        border = begin - (text[begin - 1 : begin] == " ")  # where the sentence before it ends
        stop = begin + len(fact.statement.strip(" "))
        before, upto = np.searchsorted(ends, (border, stop), side="right").tolist()
        if cell is not None:
            wanted = round(place * (len(ends) - (upto - before)))
            planted[number] = Planted(fact, cell, before, wanted)
    return Haystack(text, tuple(planted[number] for number in sorted(planted)))


def _spread(cells: Sequence[float], depths: Sequence[float]) -> list[float]:
    """Returns a place in [0, 1] for each cell; needles of one depth lie apart, near it.

    They share half of the way to the neighboring depths: 25 among 0,25,50 covers 18.75 to 31.25.
    """
    ordered = sorted(set(depths))
    gaps = [high - low for low, high in itertools.pairwise(ordered)]
    reach = min(gaps, default=10.0) / 4
    places: list[float] = []
    seen: dict[float, int] = {}
    for depth in cells:
        count, index = cells.count(depth), seen.setdefault(depth, 0)
        seen[depth] += 1
        low, high = max(0.0, depth - reach), min(100.0, depth + reach)
        places.append((depth if count == 1 else low + (high - low) * index / (count - 1)) / 100)
    return places

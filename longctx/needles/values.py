"""The words of one half of the lexicon, and the values that answer questions."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from longctx.needles import lexicon

ONSETS = tuple("b br c ch d dr f fl g gr h j k kl l m n p pl qu r s sh sk st t th tr v w z".split())
VOWELS = tuple("a e i o u ai ea io ou".split())
CODAS = ("", "", "", "l", "m", "n", "r", "s", "x", "nd", "rt", "th")
MONTHS = tuple(
    "January February March April May June July August September October November December".split()
)


@cache
def _half(words: tuple[str, ...], heldout: bool | None) -> tuple[str, ...]:
    if heldout is None:
        return words
    return tuple(word for word in words if lexicon.held_out(word) == heldout)


@dataclass(frozen=True, slots=True)
class Words:
    """Draws words from the training half, the held-out half, or (None) from both.

    `extra` are further nouns, such as the vocabulary of a training corpus.
    """

    heldout: bool | None
    extra: tuple[str, ...] = ()

    def adjective(self, rng: random.Random) -> str:
        return self._word(rng, lexicon.ADJECTIVES)

    def noun(self, rng: random.Random) -> str:
        return self._word(rng, lexicon.NOUNS)

    def verb(self, rng: random.Random) -> str:
        return rng.choice(lexicon.VERBS)

    def place(self, rng: random.Random) -> str:
        if self.extra and rng.random() < 0.08:
            return f"{self._name(rng, lexicon.PLACES)} {self._name(rng, lexicon.PLACES)}"
        return self._name(rng, lexicon.PLACES)

    def first(self, rng: random.Random) -> str:
        return self._name(rng, lexicon.FIRST_NAMES)

    def surname(self, rng: random.Random) -> str:
        return self._name(rng, lexicon.SURNAMES)

    def person(self, rng: random.Random) -> str:
        return f"{self.first(rng)} {self.surname(rng)}"

    def invented(self, rng: random.Random) -> str:
        """A pronounceable word that no list has."""
        while True:
            syllables = rng.choice((2, 2, 3))
            text = "".join(
                rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
                for _ in range(syllables)
            )
            if self.heldout is None or lexicon.held_out(text) == self.heldout:
                return text

    def _name(self, rng: random.Random, names: tuple[str, ...]) -> str:
        """In training often a name that no list has: few names would be learned by heart, where
        unknown ones have to be copied, token for token."""
        if self.extra:
            form = rng.random()
            if form < 0.3:
                return rng.choice(self.extra).capitalize()
            if form < 0.6:
                return self.invented(rng).capitalize()
        return rng.choice(_half(names, self.heldout))

    def _word(self, rng: random.Random, words: tuple[str, ...]) -> str:
        if self.extra:
            form = rng.random()
            if form < 0.45:
                return rng.choice(self.extra)
            if form < 0.52:
                return self.invented(rng)
        return rng.choice(_half(words, self.heldout))


def value(rng: random.Random, words: Words, kind: str) -> str:
    """A value of `kind`, from the same half as `words`."""
    while True:
        text = _value(rng, words, kind)
        if words.heldout is None or lexicon.held_out(text) == words.heldout:
            return text


def _digits(rng: random.Random, count: int) -> str:
    return str(rng.randint(10 ** (count - 1), 10**count - 1))


def _value(rng: random.Random, words: Words, kind: str) -> str:
    if kind == "ruler_number":
        return _digits(rng, 7)
    if kind == "ruler_word":
        return f"{words.adjective(rng)}-{words.noun(rng)}"
    if kind in ("uuid", "ruler_uuid"):
        text = f"{rng.getrandbits(128):032x}"
        return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
    if kind == "activity":
        activity = rng.choice(lexicon.ACTIVITIES)
        second = rng.choice(lexicon.ACTIVITIES)
        extra = rng.random()
        if extra < 0.45:
            return f"{activity} and {second} {rng.choice(lexicon.ADVERBS)}"
        return f"{activity} {rng.choice(lexicon.ADVERBS)}" if extra < 0.85 else activity
    makers: dict[str, Callable[[random.Random, Words], str]] = {
        "number": _number,
        "word": _word,
        "person": lambda r, w: w.person(r),
        "place": lambda r, w: w.place(r),
        "code": _code,
        "date": _date,
    }
    return makers[kind](rng, words)


def _number(rng: random.Random, words: Words) -> str:
    form = rng.random()
    if form < 0.72:
        return _digits(rng, rng.choice((3, 4, 4, 4, 5, 5, 6, 6, 7, 8, 9)))
    if form < 0.80:
        return f"{rng.randint(1000, 9_999_999):,}"
    if form < 0.86:
        return f"${rng.randint(100, 99_999):,}"
    if form < 0.89:
        return f"{rng.randint(1, 999)}.{rng.randint(1, 99)}"
    return "-".join(_digits(rng, rng.choice((2, 3))) for _ in range(3))


def _word(rng: random.Random, words: Words) -> str:
    form = rng.random()
    if form < 0.3:
        return words.noun(rng)
    if form < 0.5:
        return f"{words.adjective(rng)} {words.noun(rng)}"
    if form < 0.7:
        return f"{words.adjective(rng)}-{words.noun(rng)}"
    if form < 0.9:
        return words.invented(rng)
    return words.invented(rng).capitalize()


def _code(rng: random.Random, words: Words) -> str:
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    form = rng.random()
    if form < 0.4:
        return f"{letters}-{_digits(rng, rng.randint(2, 5))}"
    if form < 0.6:
        return f"{letters}{_digits(rng, rng.randint(2, 5))}"
    if form < 0.65:
        return f"{rng.randint(0, 19)}.{rng.randint(0, 40)}.{rng.randint(0, 99)}"
    if form < 0.9:
        return f"{rng.getrandbits(32):08x}"
    return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ23456789") for _ in range(rng.randint(5, 8)))


def _date(rng: random.Random, words: Words) -> str:
    day, month, year = rng.randint(1, 28), rng.randrange(12), rng.randint(1900, 2099)
    form = rng.random()
    if form < 0.4:
        return f"{day} {MONTHS[month]} {year}"
    if form < 0.6:
        return f"{MONTHS[month]} {day}, {year}"
    if form < 0.8:
        return f"{year}-{month + 1:02}-{day:02}"
    return f"{rng.randint(0, 23)}:{rng.randint(0, 59):02}"

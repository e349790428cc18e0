"""Draws words from one half of the lexicon, and values that answer questions."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
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
    """Draws words from the training half of the lexicon, the held-out half, or (None) from both.

    `extra` are further nouns, such as the vocabulary of a training corpus. Every method takes the
    random generator that decides, and the order of its draws is fixed: the same seed gives the
    same text in every version.
    """

    heldout: bool | None
    extra: tuple[str, ...] = ()

    def adjective(self, rng: random.Random) -> str:
        """Draw an adjective, or in training any word."""
        return self._word(rng, lexicon.ADJECTIVES)

    def noun(self, rng: random.Random) -> str:
        """Draw a noun, or in training any word."""
        return self._word(rng, lexicon.NOUNS)

    def compound(self, rng: random.Random) -> str:
        """Join an adjective and a noun with a hyphen, as in `amber-harbor`."""
        return f"{self.adjective(rng)}-{self.noun(rng)}"

    def verb(self, rng: random.Random) -> str:
        """Draw a verb in the third person; verbs are not split into halves."""
        return rng.choice(lexicon.VERBS)

    def place(self, rng: random.Random) -> str:
        """Draw the name of a place, in training sometimes of two words."""
        if self.extra and rng.random() < 0.08:
            return f"{self._name(rng, lexicon.PLACES)} {self._name(rng, lexicon.PLACES)}"
        return self._name(rng, lexicon.PLACES)

    def first(self, rng: random.Random) -> str:
        """Draw a first name."""
        return self._name(rng, lexicon.FIRST_NAMES)

    def surname(self, rng: random.Random) -> str:
        """Draw a surname."""
        return self._name(rng, lexicon.SURNAMES)

    def person(self, rng: random.Random) -> str:
        """Draw a first name and a surname."""
        return f"{self.first(rng)} {self.surname(rng)}"

    def invented(self, rng: random.Random) -> str:
        """Invent a pronounceable word that no list has."""
        while True:
            syllables = rng.choice((2, 2, 3))
            text = "".join(
                rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
                for _ in range(syllables)
            )
            if self.heldout is None or lexicon.held_out(text) == self.heldout:
                return text

    def _name(self, rng: random.Random, names: tuple[str, ...]) -> str:
        """Draw a name, in training often one that no list has.

        Few names would be learned by heart, where unknown ones have to be copied, token for token.
        """
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


Form = tuple[float, Callable[[random.Random, Words], str]]
"""Where the share of a form ends in [0, 1], and the function that writes it."""


def choose(rng: random.Random, words: Words, forms: Sequence[Form]) -> str:
    """Write a text in one of `forms`, whose shares follow each other.

    Worked example: the forms (0.3, a), (0.5, b) and (1.0, c) give a in 30% of all cases, b in 20%
    and c in 50%.
    """
    drawn = rng.random()
    write = next(write for end, write in forms if drawn < end)
    return write(rng, words)


def value(rng: random.Random, words: Words, kind: str) -> str:
    """Draw a value of `kind`, from the same half as `words`."""
    while True:
        text = _value(rng, words, kind)
        if words.heldout is None or lexicon.held_out(text) == words.heldout:
            return text


def _digits(rng: random.Random, count: int) -> str:
    return str(rng.randint(10 ** (count - 1), 10**count - 1))


NUMBER_FORMS: tuple[Form, ...] = (
    (0.72, lambda rng, _: _digits(rng, rng.choice((3, 4, 4, 4, 5, 5, 6, 6, 7, 8, 9)))),
    (0.80, lambda rng, _: f"{rng.randint(1000, 9_999_999):,}"),
    (0.86, lambda rng, _: f"${rng.randint(100, 99_999):,}"),
    (0.89, lambda rng, _: f"{rng.randint(1, 999)}.{rng.randint(1, 99)}"),
    (1.00, lambda rng, _: "-".join(_digits(rng, rng.choice((2, 3))) for _ in range(3))),
)
WORD_FORMS: tuple[Form, ...] = (
    (0.3, lambda rng, words: words.noun(rng)),
    (0.5, lambda rng, words: f"{words.adjective(rng)} {words.noun(rng)}"),
    (0.7, lambda rng, words: words.compound(rng)),
    (0.9, lambda rng, words: words.invented(rng)),
    (1.0, lambda rng, words: words.invented(rng).capitalize()),
)


def _value(rng: random.Random, words: Words, kind: str) -> str:
    if kind == "ruler_number":
        return _digits(rng, 7)
    if kind == "ruler_word":
        return words.compound(rng)
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
    return choose(rng, words, NUMBER_FORMS)


def _word(rng: random.Random, words: Words) -> str:
    return choose(rng, words, WORD_FORMS)


def _code(rng: random.Random, words: Words) -> str:
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    anything = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
    forms: tuple[Form, ...] = (
        (0.40, lambda rng, _: f"{letters}-{_digits(rng, rng.randint(2, 5))}"),
        (0.60, lambda rng, _: f"{letters}{_digits(rng, rng.randint(2, 5))}"),
        (
            0.65,
            lambda rng, _: f"{rng.randint(0, 19)}.{rng.randint(0, 40)}.{rng.randint(0, 99)}",
        ),
        (0.90, lambda rng, _: f"{rng.getrandbits(32):08x}"),
        (1.00, lambda rng, _: "".join(rng.choice(anything) for _ in range(rng.randint(5, 8)))),
    )
    return choose(rng, words, forms)


def _date(rng: random.Random, words: Words) -> str:
    day, month, year = rng.randint(1, 28), rng.randrange(12), rng.randint(1900, 2099)
    forms: tuple[Form, ...] = (
        (0.4, lambda rng, _: f"{day} {MONTHS[month]} {year}"),
        (0.6, lambda rng, _: f"{MONTHS[month]} {day}, {year}"),
        (0.8, lambda rng, _: f"{year}-{month + 1:02}-{day:02}"),
        (1.0, lambda rng, _: f"{rng.randint(0, 23)}:{rng.randint(0, 59):02}"),
    )
    return choose(rng, words, forms)

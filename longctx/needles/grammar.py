"""Filler prose from a small grammar: many shapes, no facts anyone would ask for.

Some sentences look like needles on purpose (numbers, codes, attributes): a model that has seen them
as filler does not take them for one.
"""

from __future__ import annotations

import random
import re

from longctx.needles import lexicon
from longctx.needles.values import MONTHS, Words

TEMPLATES = (
    "The {adj} {noun} {verb} the {noun} near the {adj} {noun}.",
    "In {month} {year}, {person} {verb} a {adj} {noun} and never {verb2} it again.",
    "Few people in {place} remember how the {noun} {verb} the {noun}.",
    "{First} {verb} the {noun}, but the {noun} {verb} nobody.",
    "It is said that a {adj} {noun} {verb} every {noun} of {place}.",
    "When the {noun} was {adj}, the {noun}s of {place} were {adj} as well.",
    "There were {number} {noun}s in the {noun}, and most of them were {adj}.",
    "About {number} people live between the {noun} and the {adj} {noun}.",
    "A {noun} is only as {adj} as the {noun} that {verb} it.",
    "{Place} lies {number} kilometres from {place}, on the {adj} side of the {noun}.",
    "The {noun} opened in {year} and closed {small} years later.",
    "Nobody knows why {person} {verb} the {adj} {noun}.",
    "If the {noun} {verb} the {noun}, the {noun} {verb} the {adj} {noun} instead.",
    "On {day} {month} the {adj} {noun} {verb} {number} {noun}s.",
    '"The {noun} is {adj}," said {First}, "and so is the {noun}."',
    "Although {First} {verb} the {noun}, {First} still {verb} the {adj} {noun}.",
    "Chapter {small}: the {noun} and the {noun}.",
    "See section {small}.{small} for the {adj} {noun}.",
    "The {attribute} is printed on the back of every {noun}.",
    "A {attribute} is needed before the {noun} {verb} the {noun}.",
    "Every {noun} has a {attribute}, but {First} {verb} none of them.",
    "Ask {person} about the {attribute} before you open the {noun}.",
    "The meeting about the {adj} {noun} began at {hour} and ended at {hour}.",
    "{First} and {First} {verb} the {noun} for {small} hours.",
    "First the {noun}, then the {adj} {noun}, and at last the {noun}.",
    "Was the {noun} {adj}, or was it the {noun} that {verb} the {noun}?",
    "The old {noun} of {place} {verb} more {noun}s than the new one.",
    "Between {year} and {year}, {place} {verb} {number} {adj} {noun}s.",
    "My {noun} {verb} your {noun}; your {noun} {verb} my {adj} {noun}.",
    "They walked from the {noun} to the {noun}, past the {adj} {noun} and the {adj} {noun}.",
    "Nothing in {place} is as {adj} as a {noun} in {month}.",
    "The price of a {noun} rose by {small} percent in {year}.",
    "Train {small} to {place} leaves from the {adj} platform.",
    "Each {noun} was {adj}, {adj} and rather {adj}.",
    "What the {noun} {verb}, the {noun} {verb} too.",
    "After the storm the {noun} was {adj} and the {noun} was gone.",
    "{person} wrote {small} letters to the {noun} of {place}.",
    "The {noun} ({year}) is not to be confused with the {noun} ({year}).",
    "Table {small} shows the {adj} {noun}s by {noun}.",
    "Please do not feed the {noun} when the {noun} is {adj}.",
    "A {invented} is a {adj} {noun} with {small} {noun}s.",
    "The {invented} {verb} the {invented} in the {adj} {noun}.",
    "{Invented} was born in {place} in {year} and {verb} {noun}s.",
    "Version {small}.{small} of the {noun} {verb} the {adj} {noun}.",
)
SLOT = re.compile(r"\{(\w+)\}")


def sentence(rng: random.Random, words: Words) -> str:
    """Write one sentence of filler."""
    text = SLOT.sub(lambda match: _slot(rng, words, match[1]), rng.choice(TEMPLATES))
    return text[0].upper() + text[1:]


def _slot(rng: random.Random, words: Words, name: str) -> str:
    match name:
        case "adj":
            return words.adjective(rng)
        case "noun":
            return words.noun(rng)
        case "verb" | "verb2":
            return words.verb(rng)
        case "place" | "Place":
            return words.place(rng)
        case "person":
            return words.person(rng)
        case "First":
            return words.first(rng)
        case "invented":
            return words.invented(rng)
        case "Invented":
            return words.invented(rng).capitalize()
        case "month":
            return rng.choice(MONTHS)
        case "year":
            return str(rng.randint(1700, 2030))
        case "day":
            return str(rng.randint(1, 28))
        case "hour":
            return f"{rng.randint(0, 23)}:{rng.randint(0, 59):02}"
        case "small":
            return str(rng.randint(2, 40))
        case "number":
            return str(rng.randint(10, 99_999))
        case "attribute":
            return rng.choice(lexicon.ATTRIBUTES[rng.choice(tuple(lexicon.ATTRIBUTES))])
    raise AssertionError(f"no such slot: {name}")

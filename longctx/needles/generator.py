"""Text with known answers: filler, needles, and needles put into filler.

The contract (names stay; nothing here imports torch):

    needle(seed, *, kind="any", heldout=True) -> Needle
        One fact: `.statement` (goes into the haystack), `.question`, `.answer` (the whole value).
        `kind` is one of `KINDS`: number, word, person, place, code, date, activity, ruler, uuid,
        any.
    distractors(needle, count, seed) -> list[Needle]
        The same attribute of other keys: what a model confuses.
    ruler(task, seed) -> RulerCase
        A `task` of `RULER_TASKS`: needles, question, answers.
    haystack(tokens, *, seed, count_tokens) -> str
        Varied filler of about `tokens` tokens (never more), by this module's own grammar.
    insert(text, statements, depths) -> str
        Each statement at its depth in [0, 1], at the nearest sentence end.

`heldout=True` draws key words and values that training never draws (`lexicon.held_out`).
The same seed gives the same text on every machine and Python version.
RULER's formats: https://arxiv.org/abs/2404.06654; the single needle: Greg Kamradt,
https://github.com/gkamradt/LLMTest_NeedleInAHaystack.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longctx.needles import lexicon
from longctx.needles.grammar import sentence
from longctx.needles.placing import put
from longctx.needles.values import Form, Words, choose, value

NOT_MENTIONED = "Not mentioned."
KINDS = ("number", "word", "person", "place", "code", "date", "activity", "ruler", "uuid", "any")
RULER_TASKS = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multivalue",
    "niah_multiquery",
)
RULER_NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)

# A = attribute, E = key with its article, V = value. The key always comes before the value: the
# last layer copies a value whose tokens already know their key.
STATEMENTS = (
    "The {A} of {E} is {V}.",
    "The {A} of {E} is {V}.",
    "The {A} for {E} is {V}.",
    "The {A} of {E} was {V}.",
    "{Es} {A} is {V}.",
    "The {A} of {E} is: {V}.",
    "The {A} of {E} has been changed to {V}.",
    "Note that the {A} of {E} is {V}.",
    "Remember that the {A} for {E} is {V}.",
    "For {E}, the {A} is {V}.",
    "As for {E}, its {A} is {V}.",
    "The {A} assigned to {E} is {V}.",
    "The {A} of {E} is {V}, as everybody knows.",
    "The {A} of {E} is now {V}; please write it down.",
    "Please note: the {A} for {E} is {V}.",
    "It was decided that the {A} of {E} would be {V}.",
    "According to the records, the {A} of {E} is {V}.",
    "One of the {A}s for {E} is: {V}.",
    "{E} has the {A} {V}.",
    "{E}: {A} {V}.",
    "{A} of {E}: {V}.",
    "{A} of {E}: {V}\n",
    "- {A} of {E}: {V}\n",
    "{A} ({E}) = {V}\n",
    "{E} | {A} | {V}\n",
    "If anyone asks, the {A} of {E} is {V}.",
    "We set the {A} of {E} to {V}.",
    "The {A} that belongs to {E} is {V}.",
    "To whom it may concern: the {A} of {E} is {V}.",
    'The {A} of {E} is "{V}".',
)
QUESTIONS = (
    "What is the {A} of {E}?",
    "What is the {A} of {E}?",
    "What is the {A} of {E}?",
    "What is the {A} for {E}?",
    "What is {Es} {A}?",
    "What was the {A} of {E}?",
    "What's the {A} of {E}?",
    "Which {A} does {E} have?",
    "Tell me the {A} of {E}.",
    "Give me the {A} for {E}.",
    "Find the {A} of {E}.",
    "{A} of {E}?",
    "Do you know the {A} of {E}?",
    "According to the document, what is the {A} of {E}?",
    "What is the {A} of {E} mentioned in the text?",
    "What is the {A} for {E} mentioned in the provided text?",
    "What is the {A} of {E}? Answer with the value only.",
    "What is the {A} of {E}? Do not give information outside the document.",
    "I need the {A} of {E}.",
    "Read the document and answer: what is the {A} of {E}?",
)
RULER_STATEMENT = "One of the special magic {kinds} for {key} is: {value}."
RULER_QUESTIONS = (
    "What is the special magic {kind} for {key} mentioned in the provided text?",
    "What are all the special magic {kinds} for {key} mentioned in the provided text?",
    "What is the special magic {kind} for {key} mentioned in the provided text? The special magic"
    " {kind} for {key} mentioned in the provided text is",
    "What is the special magic {kind} for {key}?",
)
ACTIVITY_KEYS = (
    "best thing to do in {E}",
    "most fun thing to do in {E}",
    "cheapest thing to do in {E}",
    "first thing to do in {E}",
    "best way to spend a day in {E}",
    "worst thing to do in {E}",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needle:
    """A fact, the sentence that states it, a question that asks for it, and the whole answer."""

    statement: str
    question: str
    answer: str
    key: str
    attribute: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RulerCase:
    """One example of a RULER task: `needles` go into the haystack, all `answers` are wanted."""

    task: str
    needles: tuple[str, ...]
    intro: str
    question: str
    answers: tuple[str, ...]


ENTITY_FORMS: tuple[Form, ...] = (
    (0.34, lambda rng, words: f"the {words.adjective(rng)} {words.noun(rng)}"),
    (0.44, lambda rng, words: f"the {words.noun(rng)} {words.noun(rng)}"),
    (0.52, lambda rng, words: f"the {words.place(rng)} {words.noun(rng)}"),
    (
        0.60,
        lambda rng, words: f"the {words.adjective(rng)} {words.adjective(rng)} {words.noun(rng)}",
    ),
    (0.70, lambda rng, words: words.person(rng)),
    (0.75, lambda rng, words: f"{words.first(rng)}'s {words.noun(rng)}"),
    (0.81, lambda rng, words: words.compound(rng)),
    (0.88, lambda rng, words: words.invented(rng).capitalize()),
    (0.92, lambda rng, words: f"{words.noun(rng)} {rng.randint(2, 999)}"),
    (0.96, lambda rng, words: f"the {words.noun(rng)} in {words.place(rng)}"),
    (1.00, lambda rng, words: f"the {words.noun(rng)}"),
)


def entity(rng: random.Random, words: Words) -> str:
    """Write a key as a sentence has it, with its article where it has one."""
    return choose(rng, words, ENTITY_FORMS)


def similar(rng: random.Random, words: Words, key: str) -> str:
    """Write another key that shares all but one word with `key`: the hardest distractor."""
    parts = re.split(r"([ -])", key)
    spots = [i for i, part in enumerate(parts) if part.isalpha() and part not in ("the", "in")]
    if not spots:
        return entity(rng, words)
    spot = rng.choice(spots)
    old = parts[spot]
    if old.istitle():
        parts[spot] = rng.choice((words.place, words.first, words.surname))(rng)
    else:
        last = spot == spots[-1]
        parts[spot] = words.noun(rng) if last else words.adjective(rng)
    return "".join(parts)


def statement_of(rng: random.Random, attribute: str, key: str, answer: str) -> str:
    """State the fact in one of the forms that documents use."""
    return _fill(rng.choice(STATEMENTS), attribute, key, answer)


def question_of(rng: random.Random, attribute: str, key: str) -> str:
    """Ask for the fact in one of the forms that people use."""
    return _fill(rng.choice(QUESTIONS), attribute, key, "")


def _fill(template: str, attribute: str, key: str, answer: str) -> str:
    owner = key + ("'" if key.endswith("s") else "'s")
    text = template.format(A=attribute, E=key, Es=owner, V=answer)
    # "Gate 14" opens a sentence, "- access code" opens a list item that stays as it is
    return text[0].upper() + text[1:]


def attribute_of(rng: random.Random, words: Words, kind: str) -> str:
    """Draw what is said about the key; sometimes two plain words, so that any phrase works."""
    if rng.random() < 0.12:
        return f"{words.adjective(rng)} {words.noun(rng)}"
    return rng.choice(lexicon.ATTRIBUTES["code" if kind == "uuid" else kind])


def make(
    rng: random.Random, words: Words, *, kind: str, key: str | None = None, attribute: str = ""
) -> Needle:
    """Make a needle with a random generator that goes on; `needle` does so from a seed."""
    if kind == "any":
        kind = rng.choices(
            ("number", "word", "person", "place", "code", "date", "activity", "ruler", "uuid"),
            weights=(26, 12, 7, 5, 12, 7, 6, 20, 5),
        )[0]
    if kind == "ruler":
        return _ruler_needle(rng, words, key)
    if kind == "activity":
        place = key or words.place(rng)
        subject = attribute or rng.choice(ACTIVITY_KEYS)
        answer = value(rng, words, "activity")
        phrase = subject.format(E=place)
        return Needle(
            statement=f"The {phrase} is {'to ' if rng.random() < 0.3 else ''}{answer}.",
            question=f"What is the {phrase}?",
            answer=answer,
            key=place,
            attribute=subject,
            kind=kind,
        )
    attribute = attribute or attribute_of(rng, words, kind)
    key = key or entity(rng, words)
    answer = value(rng, words, kind)
    while answer.lower() in f"{attribute} {key}".lower():  # a place named after the answer
        answer = value(rng, words, kind)
    return Needle(
        statement=statement_of(rng, attribute, key, answer),
        question=question_of(rng, attribute, key),
        answer=answer,
        key=key,
        attribute=attribute,
        kind=kind,
    )


def _ruler_needle(rng: random.Random, words: Words, key: str | None) -> Needle:
    form = rng.choices(("number", "word", "uuid"), weights=(7, 2, 2))[0]
    kinds = {"number": "numbers", "word": "words", "uuid": "uuids"}[form]
    answer = value(rng, words, f"ruler_{form}")
    key = key or (value(rng, words, "uuid") if rng.random() < 0.06 else words.compound(rng))
    question = rng.choice(RULER_QUESTIONS).format(kind=kinds[:-1], kinds=kinds, key=key)
    return Needle(
        statement=RULER_STATEMENT.format(kinds=kinds, key=key, value=answer),
        question=question,
        answer=answer,
        key=key,
        attribute=f"special magic {kinds[:-1]}",
        kind="ruler",
    )


def needle(seed: int, *, kind: str = "any", heldout: bool = True) -> Needle:
    """Make one needle; see the module's contract. Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of needle {kind!r}; choose one of {', '.join(KINDS)}")
    return make(random.Random(f"needle {seed}"), Words(heldout=heldout), kind=kind)


def distractors(target: Needle, count: int, seed: int, *, heldout: bool = True) -> list[Needle]:
    """Make `count` needles with the attribute of `target` and other keys, half nearly its key."""
    rng, words = random.Random(f"distractors {seed}"), Words(heldout=heldout)
    found: list[Needle] = []
    taken = {target.key}
    while len(found) < count:
        key: str | None = similar(rng, words, target.key) if len(found) % 2 else None
        attribute = "" if target.kind == "ruler" else target.attribute
        other = make(rng, words, kind=target.kind, key=key, attribute=attribute)
        if other.key not in taken and other.answer != target.answer:
            taken.add(other.key)
            found.append(other)
    return found


def ruler(task: str, seed: int, *, heldout: bool = True) -> RulerCase:
    """Make one example of a RULER task. Raises ValueError for an unknown task."""
    if task not in RULER_TASKS:
        raise ValueError(f"unknown RULER task {task!r}; choose one of {', '.join(RULER_TASKS)}")
    rng, words = random.Random(f"{task} {seed}"), Words(heldout=heldout)
    kind = "uuid" if task == "niah_single_3" else "number"
    asked = 4 if task == "niah_multiquery" else 1
    values_per_key = 4 if task == "niah_multivalue" else 1
    keys: list[str] = []
    while len(keys) < (4 if task == "niah_multikey_1" else asked):
        key = words.compound(rng)
        if key not in keys:
            keys.append(key)
    facts = [
        (key, value(rng, words, f"ruler_{kind}")) for key in keys for _ in range(values_per_key)
    ]
    answers = tuple(answer for key, answer in facts if key in keys[:asked])
    single = len(answers) == 1
    listed = ", ".join(keys[: asked - 1]) + ", and " + keys[asked - 1] if asked > 1 else keys[0]
    noun = kind if single else f"{kind}s"
    statements = [RULER_STATEMENT.format(kinds=f"{kind}s", key=key, value=v) for key, v in facts]
    rng.shuffle(statements)
    return RulerCase(
        task=task,
        needles=tuple(statements),
        intro=(
            f"{'A' if single else 'Some'} special magic {noun} {'is' if single else 'are'} hidden"
            " within the following text. Make sure to memorize it. I will quiz you about the"
            f" {noun} afterwards."
        ),
        question=(
            f"What {'is' if single else 'are all'} the special magic {noun} for {listed}"
            " mentioned in the provided text?"
        ),
        answers=answers,
    )


def haystack(tokens: int, *, seed: int, count_tokens: Callable[[str], int]) -> str:
    """Write filler of at most `tokens` tokens, and at most one sentence less, by `count_tokens`.

    Paragraphs of generated prose on unrelated subjects; no sentence states an attribute of a key
    in the way a needle does.
    """
    rng, words = random.Random(f"haystack {seed}"), Words(heldout=None)
    pieces: list[str] = []
    left = tokens
    while True:
        paragraph = [sentence(rng, words) for _ in range(rng.randint(3, 8))]
        text = " ".join(paragraph) + "\n\n"
        used = count_tokens(text)
        if used <= left:
            pieces.append(text)
            left -= used
            continue
        for piece in paragraph:
            used = count_tokens(piece + " ")
            if used > left:
                break
            pieces.append(piece + " ")
            left -= used
        return "".join(pieces).rstrip()


def insert(text: str, statements: Sequence[str], depths: Sequence[float]) -> str:
    """Put each statement at its depth (0 = start, 1 = end) into `text`, after a sentence end.

    A statement that ends with a line end keeps it: nothing else marks the end of its value.

    Raises ValueError unless there is one depth in [0, 1] for each statement.
    """
    if len(statements) != len(depths) or any(not 0 <= depth <= 1 for depth in depths):
        raise ValueError(
            f"{len(statements)} statements need as many depths in [0, 1]; got {depths}"
        )
    order = sorted(range(len(depths)), key=depths.__getitem__)
    places = [_sentence_end(text, round(depths[each] * len(text))) for each in order]
    return put(text, [statements[each] for each in order], places)[0]


def _sentence_end(text: str, wanted: int) -> int:
    """Find the nearest end of a sentence or line after `wanted`, within 400 characters."""
    if wanted <= 0:
        return 0
    match = re.compile(r"[.!?](?=\s)|(?=\n)").search(text, wanted - 1, wanted + 400)
    return match.end() if match else min(wanted, len(text))


def variant(target: Needle, rng: random.Random) -> Needle:
    """Ask for the same fact in another way."""
    if target.kind in ("ruler", "activity"):
        return target
    return dataclasses.replace(target, question=question_of(rng, target.attribute, target.key))

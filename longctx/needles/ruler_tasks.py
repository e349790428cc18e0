"""RULER's tasks, as prompts that grow to a length: `draft(task, ...)`, then `fit`.

What is asked is drawn first and stays; the text around it comes in units (a line of noise, a
sentence, another needle, two words of a list), and as many units are taken as the length allows.
So samples of one seed ask for the same at every length, and a sample is the same on every machine.
Source: https://arxiv.org/abs/2404.06654, with the sizes of its published configuration.
Differs: essays are generated prose or the user's own texts, keys and words are from this package's
lexicon, and HotpotQA is left out: `qa` reads any file of SQuAD's format.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from longctx.needles import lexicon
from longctx.needles.generator import RULER_NOISE, RULER_STATEMENT
from longctx.needles.grammar import sentence
from longctx.needles.values import Words, value

Build = Callable[[int], str]
Sentences = Callable[[random.Random, int], Sequence[str]]
"""Draws so many sentences; more of them begin with the same ones."""

COMMON_WORDS, COMMON_TIMES, OTHER_TIMES = 10, 30, 3
EXAMPLE_WORDS, EXAMPLE_TIMES = 40, 10  # of the list that shows what is asked
HOPS = 4
ZIPF, TOKENS_PER_CODED_WORD = 2.0, 50
DEPTHS = 40  # places for needles, from the beginning to the end
NIAH = "niah"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task: how many tokens an answer may have, and whether one right answer is enough."""

    answer_tokens: int
    any_answer: bool = False


TASKS: dict[str, Task] = {
    "niah_single_1": Task(answer_tokens=128),
    "niah_single_2": Task(answer_tokens=128),
    "niah_single_3": Task(answer_tokens=128),
    "niah_multikey_1": Task(answer_tokens=128),
    "niah_multikey_2": Task(answer_tokens=128),
    "niah_multikey_3": Task(answer_tokens=128),
    "niah_multivalue": Task(answer_tokens=128),
    "niah_multiquery": Task(answer_tokens=128),
    "vt": Task(answer_tokens=30),
    "cwe": Task(answer_tokens=120),
    "fwe": Task(answer_tokens=50),
    "qa": Task(answer_tokens=32, any_answer=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A prompt of any length: `build(units)` writes it, without the beginning of its answer."""

    build: Build
    least: int  # units
    most: int | None  # where there is no more text
    answers: tuple[str, ...]
    answer_prefix: str  # how the paper begins the answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Passages:
    """A file of SQuAD's format: its passages, and questions with (passage, question, answers)."""

    texts: tuple[str, ...]
    questions: tuple[tuple[int, str, tuple[str, ...]], ...]


class TooShort(ValueError):
    """A task that does not fit in the length: `needed` is what its smallest prompt has."""

    def __init__(self, needed: int) -> None:
        super().__init__(f"the smallest prompt has {needed:,} tokens")
        self.needed = needed


def draft(
    task: str,
    rng: random.Random,
    *,
    tokens: int,
    sentences: Sentences,
    passages: Passages | None = None,
) -> Draft:
    """Draw what one sample of `task` asks; `tokens` is the length that it shall come to.

    Raises ValueError for an unknown task, and for `qa` without passages.
    """
    if task not in TASKS:
        raise ValueError(f"unknown RULER task {task!r}; choose from {', '.join(TASKS)}")
    if task.startswith(NIAH):
        return _needles(task, rng, sentences)
    if task == "vt":
        return _variables(rng)
    if task == "cwe":
        return _common_words(rng, tokens)
    if task == "fwe":
        return _frequent_words(rng, tokens)
    if passages is None:
        raise ValueError("the task qa needs a file in SQuAD's format")
    return _questions(rng, passages)


def fit(draft: Draft, tokens: int, count_tokens: Callable[[str], int]) -> str:
    """Write the longest prompt of at most `tokens` tokens: one unit more would be too many.

    Raises TooShort where not even the smallest prompt fits.
    """
    counted: dict[int, int] = {}

    def count(units: int) -> int:
        if units not in counted:
            counted[units] = count_tokens(draft.build(units))
        return counted[units]

    low = draft.least
    if count(low) > tokens:
        raise TooShort(count(low))
    # Steps that grow until one does not fit, each where a straight line says the limit is
    known, step = low, 8
    high: int | None = None
    while high is None:
        wanted = low + step
        if draft.most is not None and wanted >= draft.most:
            if count(draft.most) <= tokens:
                return draft.build(draft.most)
            high = draft.most
            break
        if count(wanted) > tokens:
            high = wanted
            break
        known, low = low, wanted
        per_unit = max(0.1, (count(low) - count(known)) / (low - known))
        step = max(2 * step, math.ceil((tokens - count(low)) / per_unit) + 1)
    turn = 0
    while high - low > 1:
        line = low + (tokens - count(low)) * (high - low) // max(1, count(high) - count(low))
        middle = line if turn % 3 else (low + high) // 2  # a bad line cannot last
        middle = min(high - 1, max(low + 1, middle))
        low, high = (middle, high) if count(middle) <= tokens else (low, middle)
        turn += 1
    return draft.build(low)


def generated_sentences(rng: random.Random, count: int) -> Sequence[str]:
    """Draw sentences of prose on unrelated subjects, none of which states a needle."""
    words = Words(heldout=None)
    return [sentence(rng, words) for _ in range(count)]


def read_passages(file: Path) -> Passages:
    """Read a file of SQuAD's format; questions without an answer are left out.

    Raises ValueError where the file is none, and OSError where it cannot be read.
    """
    texts: list[str] = []
    questions: list[tuple[int, str, tuple[str, ...]]] = []
    try:
        for article in json.loads(file.read_text(encoding="utf-8"))["data"]:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    answers = tuple(dict.fromkeys(each["text"] for each in asked["answers"]))
                    if answers:
                        questions.append((len(texts), asked["question"], answers))
                texts.append(paragraph["context"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not in SQuAD's format: {error!r}") from error
    if not questions:
        raise ValueError(f"{file} has no question with an answer")
    return Passages(texts=tuple(texts), questions=tuple(questions))


def _needles(task: str, rng: random.Random, sentences: Sentences) -> Draft:
    kinds = {"niah_single_3": ("word", "uuid"), "niah_multikey_3": ("uuid", "uuid")}
    key_kind, value_kind = kinds.get(task, ("word", "number"))
    noun = "uuid" if value_kind == "uuid" else "number"
    asked = 4 if task == "niah_multiquery" else 1
    stated = 4 if task == "niah_multikey_1" else asked
    values_each = 4 if task == "niah_multivalue" else 1
    seed = rng.getrandbits(48)
    facts = _facts(random.Random(f"keys {seed}"), key_kind, value_kind, heldout=True)
    keys, answers, statements = [], [], []
    for number in range(stated):
        key, first = facts(frozenset())
        values = [first] + [facts(frozenset())[1] for _ in range(values_each - 1)]
        keys.append(key)
        answers += values if number < asked else []
        statements += [_statement(noun, key, each) for each in values]

    def build(units: int) -> str:
        place = random.Random(f"places {seed}")
        if task == "niah_single_1":
            text = _among(place, [RULER_NOISE] * units, statements, "\n")
        elif task in ("niah_multikey_2", "niah_multikey_3"):
            others = _facts(random.Random(f"others {seed}"), key_kind, value_kind, heldout=None)
            around = [_statement(noun, *others(frozenset(keys))) for _ in range(units)]
            text = _among(place, around, statements, "\n")
        else:
            around = list(sentences(random.Random(f"text {seed}"), units))
            text = _among(place, around, statements, " ")
        return f"{intro}\n{text}\n{question}"

    several = len(answers) > 1
    nouns, verb = (f"{noun}s", "are all") if several else (noun, "is")
    hidden = f"Some special magic {nouns} are" if several else f"A special magic {noun} is"
    query = ", ".join(keys[: asked - 1]) + f", and {keys[asked - 1]}" if asked > 1 else keys[0]
    intro = (
        f"{hidden} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {nouns} afterwards."
    )
    question = f"What {verb} the special magic {nouns} for {query} mentioned in the provided text?"
    return Draft(
        build=build,
        least=1,
        most=None,
        answers=tuple(answers),
        answer_prefix=f" The special magic {nouns} for {query} mentioned in the provided text "
        + ("are" if several else "is"),
    )


def _facts(
    rng: random.Random, key_kind: str, value_kind: str, *, heldout: bool | None
) -> Callable[[frozenset[str]], tuple[str, str]]:
    """Return what draws a new key, not of `taken`, and a new value each time."""
    words, seen = Words(heldout=heldout), set[str]()

    def new(draw: Callable[[], str], taken: frozenset[str]) -> str:
        while (text := draw()) in seen or text in taken:
            pass
        seen.add(text)
        return text

    def fact(taken: frozenset[str]) -> tuple[str, str]:
        key_of = words.compound if key_kind == "word" else lambda rng: value(rng, words, "uuid")
        return (
            new(lambda: key_of(rng), taken),
            new(lambda: value(rng, words, f"ruler_{value_kind}"), taken),
        )

    return fact


def _statement(noun: str, key: str, answer: str) -> str:
    return RULER_STATEMENT.format(kinds=f"{noun}s", key=key, value=answer)


def _among(rng: random.Random, around: list[str], statements: Sequence[str], seam: str) -> str:
    """Put the statements between the pieces, each at one of 40 depths, in an order of their own."""
    depths = sorted(rng.sample(range(DEPTHS), len(statements)))
    mixed = rng.sample(statements, len(statements))
    pieces: list[str] = []
    begin = 0
    for depth, statement in zip(depths, mixed, strict=True):
        end = round(depth * len(around) / (DEPTHS - 1))
        pieces += [*around[begin:end], statement]
        begin = end
    return seam.join([*pieces, *around[begin:]])


def _variables(rng: random.Random) -> Draft:
    names, number = _variable_names(rng, 5), str(rng.randint(10_000, 99_999))
    shown_names, shown_number = _variable_names(rng, 3), str(rng.randint(10_000, 99_999))
    seed = rng.getrandbits(48)

    def chain(names: Sequence[str], number: str, lines: int, place: random.Random) -> str:
        assigned = [f"VAR {names[0]} = {number}"]
        assigned += [f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(names)]
        spots = sorted(place.randint(0, lines) for _ in assigned)
        pieces = [RULER_NOISE] * lines
        for spot, line in reversed(list(zip(spots, assigned, strict=True))):
            pieces.insert(spot, line)  # the order of the chain is the order of the text
        return (
            "Memorize and track the chain(s) of variable assignment hidden in the following text."
            "\n\n" + "\n".join(pieces) + "\nQuestion: Find all variables that are assigned the "
            f"value {number} in the text above."
        )

    def prefix(number: str) -> str:
        return (
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{HOPS + 1} variables are assigned the value {number}, they are: "
        )

    shown = chain(shown_names, shown_number, 5, random.Random(f"shown {seed}"))
    example = f"{shown}{prefix(shown_number)}{' '.join(shown_names)}\n"
    return Draft(
        build=lambda units: example + chain(names, number, units, random.Random(f"vt {seed}")),
        least=1,
        most=None,
        answers=tuple(names),
        answer_prefix=prefix(number),
    )


def _variable_names(rng: random.Random, letters: int) -> list[str]:
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(letters))
        if name not in names:
            names.append(name)
    return names


def _common_words(rng: random.Random, tokens: int) -> Draft:
    words, seed = Words(heldout=None), rng.getrandbits(48)
    known = dict.fromkeys((*lexicon.ADJECTIVES, *lexicon.NOUNS, *lexicon.VERBS))
    # Common and other words are drawn from one pool, so that being invented tells nothing
    invent = random.Random(f"words {seed}")
    while len(known) < tokens // 8 + COMMON_WORDS + EXAMPLE_WORDS:
        known.setdefault(words.invented(invent))
    pool = list(known)
    rng.shuffle(pool)
    shown, pool = pool[:EXAMPLE_WORDS], pool[EXAMPLE_WORDS:]
    common, others = pool[:COMMON_WORDS], pool[COMMON_WORDS:]

    def listed(common: list[str], times: int, others: list[str], order: str) -> str:
        all_words = [*common * times, *others * OTHER_TIMES]
        random.Random(f"{order} {seed}").shuffle(all_words)
        numbered = " ".join(f"{number}. {word}" for number, word in enumerate(all_words, start=1))
        return (
            "Below is a numbered list of words. In these words, some appear more often than others."
            f" Memorize the ones that appear most often.\n{numbered}\nQuestion: What are the "
            f"{COMMON_WORDS} most common words in the above list?"
        )

    prefix = f" Answer: The top {COMMON_WORDS} words that appear most often in the list are:"
    shown_common = shown[:COMMON_WORDS]
    numbered = " ".join(f"{number}. {word}" for number, word in enumerate(shown_common, start=1))
    example = (
        listed(shown_common, EXAMPLE_TIMES, shown[COMMON_WORDS:], "shown") + f"{prefix} {numbered}"
    )
    return Draft(
        build=lambda units: f"{example}\n" + listed(common, COMMON_TIMES, others[:units], "cwe"),
        least=1,
        most=len(others),
        answers=tuple(common),
        answer_prefix=prefix,
    )


def _frequent_words(rng: random.Random, tokens: int) -> Draft:
    """Coded words by Zipf's law; the most frequent one is `...`, which does not count."""
    names: dict[str, None] = {}
    while len(names) < max(8, tokens // TOKENS_PER_CODED_WORD):
        names.setdefault("".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(6)))
    ranked = ["...", *names]
    seed = rng.getrandbits(48)
    total = sum(rank**-ZIPF for rank in range(1, 1_000_000))

    def times(units: int) -> list[int]:
        return [int(units * rank**-ZIPF / total) for rank in range(1, len(ranked) + 1)]

    def build(units: int) -> str:
        text = [
            word for word, count in zip(ranked, times(units), strict=True) for _ in range(count)
        ]
        random.Random(f"fwe {seed}").shuffle(text)
        return (
            "Read the following coded text and track the frequency of each coded word. Find the "
            f"three most frequently appeared coded words. {' '.join(text)}\nQuestion: Do not "
            "provide any explanation. Please ignore the dots '....'. What are the three most "
            "frequently appeared words in the above coded text?"
        )

    # The third and the fourth are told apart from here on
    least = bisect_left(
        range(1, 10_000), True, key=lambda units: times(units)[3] >= times(units)[4] + 2
    )
    return Draft(
        build=build,
        least=least + 1,
        most=None,
        answers=tuple(ranked[1:4]),
        answer_prefix=" Answer: According to the coded text above, the three most frequently "
        "appeared words are:",
    )


def _questions(rng: random.Random, passages: Passages) -> Draft:
    passage, question, answers = rng.choice(passages.questions)
    others = [number for number in range(len(passages.texts)) if number != passage]
    rng.shuffle(others)
    seed = rng.getrandbits(48)
    told = (
        "Answer the question based on the given documents. Only give me the answer and do not "
        "output any other words."
    )

    def build(units: int) -> str:
        chosen = [passage, *others[:units]]
        random.Random(f"qa {seed}").shuffle(chosen)
        documents = "\n\n".join(
            f"Document {number}:\n{passages.texts[each]}"
            for number, each in enumerate(chosen, start=1)
        )
        return (
            f"{told}\n\nThe following are given documents.\n\n{documents}\n\n{told}\n\n"
            f"Question: {question}"
        )

    return Draft(build=build, least=0, most=len(others), answers=answers, answer_prefix=" Answer:")

"""Training batches for needle: documents with many facts, and questions about them.

The rows of a batch are one memory, so every fact of the batch is a distractor for every other.
Filler comes from a token array; spans that drew attention come back more often (hard filler).
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer

from longctx.needles import generator
from longctx.needles.generator import NOT_MENTIONED, RULER_NOISE, Needle
from longctx.needles.values import Words
from longctx.training.model import Batch
from longctx.training.tokenizer import ASSISTANT, BOS, EOS, SPECIALS, SYSTEM, USER

HIDDEN = -1e9
SPAN_TOKENS = 48
BAIT_TOKENS = 24
FACTS_PER_ROW = (3, 4, 5, 6, 7)
SIBLINGS = (0, 1, 3, 8, 8)  # further facts of the same attribute
POINTED = 0.06  # values with a full stop inside are rare, and only their ends are hard
INNER_POINT = re.compile(r"\d\.\d")
LINE_ENDS = ("\n", "\n", "\n\n", "\n    ", "\n\n    ", "\n        ", "\n\n\n")
INSTRUCTIONS = (
    "You are a helpful assistant.",
    "You are a helpful AI bot that answers questions for a user. Keep your response short and"
    " direct.",
    "Answer the question about the document. Be brief.",
    "Use only what the document says.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The size of a batch, and how its memory is divided."""

    document_rows: int = 8
    document_tokens: int = 256
    question_rows: int = 8
    question_tokens: int = 128
    groups: int = 1  # questions of a group see the documents of that group only
    dilution: float = 9.0  # up to this much is added to the scores of filler


@dataclass(slots=True)
class Placed:
    """A needle and the text that states it.

    Once it is in a document, `answer` has the tokens of its answer there, and `place` the index of
    the first of them in memory.
    """

    needle: Needle
    statement: str
    answer: list[int] = field(default_factory=list)
    place: int = -1


@dataclass(slots=True)
class HardFiller:
    """Spans of filler that attention went to; the least attended leave first."""

    capacity: int = 4096
    spans: list[tuple[float, np.ndarray]] = field(default_factory=list)

    def add(self, score: float, span: np.ndarray) -> None:
        """Keep a span [tokens] that got attention `score`."""
        self.spans.append((score, span))
        if len(self.spans) > self.capacity * 5 // 4:
            self.spans.sort(key=lambda item: -item[0])
            # Scores age, so that spans the model has learned make room.
            self.spans = [(s * 0.8, span) for s, span in self.spans[: self.capacity]]


class Batches:
    """Makes training batches; batch `step` of a seed is always the same but for the hard filler."""

    def __init__(
        self, tokenizer: Tokenizer, filler: np.ndarray, words: tuple[str, ...], seed: int
    ) -> None:
        self.tokenizer, self.filler, self.seed = tokenizer, filler, seed
        self.words = Words(heldout=False, extra=words)
        self.hard = HardFiller()
        self.bos, self.eos = SPECIALS.index(BOS), SPECIALS.index(EOS)
        self.user, self.assistant = SPECIALS.index(USER), SPECIALS.index(ASSISTANT)
        self.system = SPECIALS.index(SYSTEM)
        self.newline = self._encode("\n")
        self.noise = np.array(self._encode(" " + RULER_NOISE))
        self.not_mentioned = self._encode(NOT_MENTIONED)

    def make(self, step: int, shape: Shape) -> Batch:
        """Make batch number `step`."""
        rng = random.Random(f"{self.seed} {step}")
        rows_per_group = shape.document_rows // shape.groups
        questions_per_group = shape.question_rows // shape.groups
        documents = np.zeros((shape.document_rows, shape.document_tokens), np.int64)
        questions = np.zeros((shape.question_rows, shape.question_tokens), np.int64)
        is_filler = np.zeros(documents.shape, bool)
        own_filler = np.zeros(questions.shape, bool)
        supervised: list[tuple[int, int, int, int]] = []
        taken: set[tuple[str, str]] = set()
        families: dict[int, list[Placed]] = {}
        for group in range(shape.groups):
            facts: list[Placed] = []
            for row in range(group * rows_per_group, (group + 1) * rows_per_group):
                first = row == group * rows_per_group
                count = rng.choice(FACTS_PER_ROW) if shape.document_tokens > 200 else 2
                waiting = families.get(group, [])
                while len(waiting) < count:
                    waiting += self._family(rng, taken)
                    rng.shuffle(waiting)
                families[group] = waiting[count:]
                documents[row], is_filler[row], kept = self._document(
                    rng, waiting[:count], shape.document_tokens, first
                )
                for fact in kept:
                    fact.place += row * shape.document_tokens
                facts.extend(kept)
            asked: list[Placed] = []
            for row in range(group * questions_per_group, (group + 1) * questions_per_group):
                ids, targets, context = self._questions(
                    rng, facts, asked, taken, shape.question_tokens
                )
                questions[row, : len(ids)] = ids
                own_filler[row, :context] = True
                supervised += [(row, *target) for target in targets]
        dilution = np.array([rng.uniform(0, shape.dilution) for _ in range(shape.question_rows)])
        memory_bias = is_filler.reshape(1, -1) * dilution[:, None]
        row_group = np.repeat(np.arange(shape.groups), rows_per_group * shape.document_tokens)
        question_group = np.repeat(np.arange(shape.groups), questions_per_group)
        memory_bias[question_group[:, None] != row_group[None]] = HIDDEN
        own_bias = own_filler * dilution[:, None]
        row_, column_, token_, place_ = map(torch.tensor, zip(*supervised, strict=True))
        return Batch(
            documents=torch.from_numpy(documents),
            questions=torch.from_numpy(questions),
            answer_row=row_,
            answer_column=column_,
            answer_token=token_,
            answer_place=place_,
            memory_bias=torch.from_numpy(memory_bias).float(),
            own_bias=torch.from_numpy(own_bias).float(),
            first_position=rng.choice((0, 0, rng.randrange(1_000_000))),
        )

    def mine(self, batch: Batch, weights: torch.Tensor, spans: int = 12) -> None:
        """Remember the filler that got the most attention; `weights` [answers, heads, memory]."""
        mass = weights.amax(dim=(0, 1)).float()
        rows, tokens = batch.documents.shape
        # Any row's bias raises filler; a bias of zero hides little.
        mass = mass * (batch.memory_bias.amax(0) > 0)
        scores, places = mass.topk(spans)
        for score, place in zip(scores.tolist(), places.tolist(), strict=True):
            if score < 0.02:
                break
            row, column = divmod(place, tokens)
            start = min(max(column - SPAN_TOKENS * 3 // 4, 0), tokens - SPAN_TOKENS)
            raised = (batch.memory_bias.amax(0) > 0).view(rows, tokens)[row]
            span = slice(start, start + SPAN_TOKENS)
            if bool(raised[span].all()):  # a span with part of a needle is no filler
                self.hard.add(score, batch.documents[row, span].numpy().astype(np.uint16))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _family(self, rng: random.Random, taken: set[tuple[str, str]]) -> list[Placed]:
        """Make a fact and up to eight of its attribute, two in three with nearly its key."""
        first = self._fact(rng, taken)
        return [
            first,
            *(self._fact(rng, taken, first.needle, i % 3 > 0) for i in range(rng.choice(SIBLINGS))),
        ]

    def _fact(
        self,
        rng: random.Random,
        taken: set[tuple[str, str]],
        sibling: Needle | None = None,
        near: bool = False,
    ) -> Placed:
        pointed = not sibling and rng.random() < POINTED
        while True:
            kind, attribute, key = "any", "", None
            if pointed:
                kind = rng.choice(("number", "code"))
            if sibling:
                kind = sibling.kind
                attribute = "" if kind == "ruler" else sibling.attribute
                key = generator.similar(rng, self.words, sibling.key) if near else None
            needle = generator.make(rng, self.words, kind=kind, key=key, attribute=attribute)
            if pointed and not INNER_POINT.search(needle.answer):
                continue
            identity = (needle.attribute.lower(), needle.key.lower())
            if identity not in taken and len(needle.statement) < 260:
                taken.add(identity)
                return Placed(needle, _varied(rng, needle))

    def _filler(self, rng: random.Random, count: int) -> np.ndarray:
        form = rng.random()
        if form < 0.3 and len(self.hard.spans) > 200 and count > SPAN_TOKENS:
            spans = []
            for _ in range(count // SPAN_TOKENS + 1):
                if rng.random() < 0.6:
                    spans.append(rng.choice(self.hard.spans)[1])
                else:
                    start = rng.randrange(len(self.filler) - SPAN_TOKENS)
                    spans.append(self.filler[start : start + SPAN_TOKENS])
            return np.concatenate(spans)[:count]
        if form < 0.34:
            return np.resize(np.roll(self.noise, -rng.randrange(len(self.noise))), count)
        start = rng.randrange(len(self.filler) - count)
        return self.filler[start : start + count]

    def _bait(self, rng: random.Random, facts: list[Placed], count: int) -> np.ndarray:
        """Pick filler with pieces of the answers: a long text has "t" followed by anything."""
        spans: list[np.ndarray] = []
        for _ in range(count // BAIT_TOKENS + 1):
            pieces = self._encode(" " + rng.choice(facts).needle.answer)
            begin = rng.randrange(max(1, len(self.filler) - 100_000))
            here = self.filler[begin : begin + 100_000]
            (hits,) = np.nonzero(here == rng.choice(pieces[:-1] or pieces))
            at = int(rng.choice(hits)) if len(hits) else rng.randrange(len(here))
            start = min(max(at - BAIT_TOKENS // 2, 0), len(here) - BAIT_TOKENS)
            spans.append(here[start : start + BAIT_TOKENS])
        return np.concatenate(spans)[:count]

    def _document(
        self, rng: random.Random, facts: list[Placed], tokens: int, first: bool
    ) -> tuple[np.ndarray, np.ndarray, list[Placed]]:
        """Make a row: its ids, which of them are filler, and the facts whose values are whole.

        Text is put together before it is tokenized, as a user's is: what follows a value may share
        a token with its end.
        """
        head = [self.bos] if first else []
        if first and rng.random() < 0.15:  # a message that holds the whole text
            head.append(self.user)
        used = len(head)
        for at, fact in enumerate(facts):
            used += len(self._encode(fact.statement))
            if used > tokens - 16:
                facts = facts[:at]
                break
        baited = facts and rng.random() < 0.5
        chosen = self._bait(rng, facts, tokens) if baited else self._filler(rng, tokens)
        filler = self.tokenizer.decode(chosen.tolist())
        share = max(0.1, (tokens - used) / tokens)
        depths = [rng.random() * share for _ in facts]
        if rng.random() < 0.75:
            text = generator.insert(filler, [fact.statement for fact in facts], depths)
        else:
            text = _thrown_in(rng, filler, [fact.statement for fact in facts], depths)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        ids = np.array([*head, *encoding.ids][:tokens])
        starts, ends = np.array(encoding.offsets)[: tokens - len(head)].T
        is_filler = np.ones(len(ids), bool)
        is_filler[: len(head)] = False
        kept = []
        for fact in facts:
            begin = text.index(fact.statement.strip(" "))
            end = begin + len(fact.statement.strip(" "))
            is_filler[len(head) :] &= (ends <= begin) | (starts >= end)
            begin = text.rindex(fact.needle.answer, begin, end)
            (inside,) = np.nonzero((ends > begin) & (starts < begin + len(fact.needle.answer)))
            # Two more tokens must follow, so that it can be seen that the value ends.
            if not len(inside) or inside[-1] + 2 >= len(starts):
                continue
            fact.answer = [encoding.ids[i] for i in inside]
            fact.place = len(head) + int(inside[0])
            if self.tokenizer.decode(fact.answer) == fact.needle.answer:
                kept.append(fact)
        if len(ids) < tokens:
            more = self._filler(rng, tokens - len(ids))
            ids = np.concatenate((ids, more))
            is_filler = np.concatenate((is_filler, np.ones(len(more), bool)))
        return ids, is_filler, kept

    def _questions(
        self,
        rng: random.Random,
        facts: list[Placed],
        asked: list[Placed],
        taken: set[tuple[str, str]],
        tokens: int,
    ) -> tuple[list[int], list[tuple[int, int, int]], int]:
        """Make a row of questions: its ids, the targets, and how many ids are filler.

        A target is the column of an answer token, the token after it, and that one's place.
        """
        context = rng.choice((0, 8, 16, 24, 32, 48, 64))
        ids = self._filler(rng, context).tolist() if context else []
        if rng.random() < 0.8:
            ids += self.newline
        if rng.random() < 0.25:
            text = rng.choice(INSTRUCTIONS)
            extra = self._filler(rng, 20).tolist() if rng.random() < 0.3 else self._encode(text)
            ids += [self.system, *extra]
        marker = [self.user] if rng.random() < 0.85 else []
        targets: list[tuple[int, int, int]] = []
        while True:
            if rng.random() < 0.04 or not facts:
                sibling = rng.choice(facts).needle if facts and rng.random() < 0.6 else None
                absent = self._fact(rng, taken, sibling, near=rng.random() < 0.5)
                question, answer, place = absent.needle.question, self.not_mentioned, -1
            else:
                if not asked:
                    asked += rng.sample(facts, len(facts))
                fact = asked.pop()
                question = generator.variant(fact.needle, rng).question
                answer, place = fact.answer, fact.place
            if rng.random() < 0.05:
                question = question.lower()
            # Finding the value is hard, copying the rest of it is not: often only the first token
            # is asked for, so that a row holds more questions.
            whole = [*answer, self.eos] if rng.random() < 0.7 else []
            turn = [*marker, *self._encode(question), self.assistant, *whole]
            if len(ids) + len(turn) > tokens:
                if targets:
                    return ids, targets, min(context, len(ids))
                ids = []  # a long turn comes first: drop the filler to make room for it
                if len(turn) > tokens:
                    continue
            start = len(ids) + len(turn) - len(whole) - 1
            ids += turn
            for i, token in enumerate(whole or answer[:1]):
                at = place + i if place >= 0 else -1
                targets.append((start + i, token, at))
            marker = [self.user]


def _varied(rng: random.Random, needle: Needle) -> str:
    """Vary the statement: sometimes a line ends before the value, or after the statement."""
    statement = needle.statement
    if rng.random() < 0.12:
        spaces = [i for i, c in enumerate(statement) if c == " "]
        spaces = [i for i in spaces if i < statement.rindex(needle.answer) - 1]
        if spaces:
            at = rng.choice(spaces)
            statement = statement[:at] + "\n" + statement[at + 1 :]
    if rng.random() < 0.1 or (statement.endswith("\n") and rng.random() < 0.5):
        statement = statement.rstrip("\n") + rng.choice(LINE_ENDS)
    return statement


def _thrown_in(rng: random.Random, text: str, statements: list[str], depths: list[float]) -> str:
    """Put the statements anywhere, in the middle of a word if it happens so."""
    pieces, start = [], 0
    for depth, statement in sorted(zip(depths, statements, strict=True)):
        at = round(depth * len(text))
        gap = rng.choice((" ", " ", "\n", ""))
        pieces += [text[start:at], gap, statement.strip(" "), rng.choice((" ", " ", "\n", "\n\n"))]
        start = at
    return "".join([*pieces, text[start:]])

"""Draws what a model says to prompts in its exact pass, in few steps of that pass.

A step of the float32 pass widens all of the model's weights, for one token of each answer as for
fifty. So the model as it serves says some tokens first. The exact pass reads them at once and
draws a token at each of them, with the same noise: up to the first one that differs, and with it,
these are the answer. That is speculative decoding (2211.17192), of a draft that differs from the
target by rounding alone. Noise is Gumbel's, one number for each token that may be said, so that two
distributions that hardly differ rarely draw different tokens, however flat they are. (A sampler
that inverts one number in the order of ids does, on a flat distribution.) Read `draw_answers`.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from longctx.engine.sequence import Sequence as EngineSequence
from longctx.quality.replay import Replay


@dataclass(slots=True)
class Answer:
    """What was said to a prompt so far, and the logits [1, vocab] of each of its tokens."""

    prompt: Sequence[int]
    most: int  # tokens that are said
    seed: int
    spoken: list[int] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)

    @property
    def room(self) -> int:
        """How many tokens may follow."""
        return self.most - len(self.spoken)

    def draw(self, row: Tensor, ahead: int = 0) -> int:
        """Draw the token that comes `ahead` after the next one, at temperature 1, from its logits.

        The same row gives the same token each time.
        """
        noise = np.random.default_rng((self.seed, len(self.spoken) + ahead))
        waiting = torch.from_numpy(noise.standard_exponential(row.numel())).to(row.device)
        return int((row.flatten().double() - waiting.log()).argmax())

    def say(self, token: int, row: Tensor) -> None:
        """Append a token that was drawn from the logits `row`."""
        self.spoken.append(token)
        self.rows.append(row)


def draw_answers(
    answers: Sequence[Answer],
    exact: Replay,
    draft: Replay | None,
    *,
    eos: Collection[int],
    enough: Callable[[int], bool],
) -> None:
    """Complete `answers` by what `exact` draws, each until a token of `eos` or until it is full.

    `draft` says first what `exact` then reads; None where it would not be faster. `enough` is asked
    before each step, with the number of tokens that all answers have, whether to stop early.
    """
    held: dict[int, EngineSequence] = {}  # of answers whose sequence in `exact` has read no other
    while True:
        speaking = [
            answer
            for answer in answers
            if answer.room > 0 and not (answer.spoken and answer.spoken[-1] in eos)
        ]
        if not speaking or enough(sum(len(answer.spoken) for answer in answers)):
            break
        drafts = [[] for _ in speaking] if draft is None else _say(speaking, draft, eos, enough)
        _check(speaking, drafts, exact, eos, held)
    for sequence in held.values():
        exact.release(sequence)


def _say(
    answers: Sequence[Answer],
    draft: Replay,
    eos: Collection[int],
    enough: Callable[[int], bool],
) -> list[list[int]]:
    """Return what `draft` says next to each, all but the last token that there is room for."""
    said: list[list[int]] = [[] for _ in answers]
    sequences = [_admitted(draft, answer) for answer in answers]
    known = sum(len(answer.spoken) for answer in answers)
    while True:
        speaking = [
            index
            for index, answer in enumerate(answers)
            if len(said[index]) + 1 < answer.room and not (said[index] and said[index][-1] in eos)
        ]
        if not speaking or enough(known + sum(map(len, said))):
            break
        chunks = [(sequences[index], sequences[index].blocks.remaining) for index in speaking]
        for index, row in zip(speaking, draft.feed(chunks, [1] * len(chunks)), strict=True):
            token = answers[index].draw(row, len(said[index]))
            said[index].append(token)
            sequences[index].blocks.tokens.append(token)
    for sequence in sequences:
        draft.release(sequence)
    return said


def _check(
    answers: Sequence[Answer],
    drafts: Sequence[Sequence[int]],
    exact: Replay,
    eos: Collection[int],
    held: dict[int, EngineSequence],
) -> None:
    """Let `exact` read the drafts, and append what it draws until that is another token."""
    sequences = []
    for answer, draft in zip(answers, drafts, strict=True):
        sequence = held.pop(id(answer), None) or _admitted(exact, answer)
        for token in draft:
            sequence.blocks.tokens.append(token)
        sequences.append(sequence)
    chunks = [(sequence, sequence.blocks.remaining) for sequence in sequences]
    read = exact.feed(chunks, [len(draft) + 1 for draft in drafts])
    for answer, draft, sequence, rows in zip(answers, drafts, sequences, read, strict=True):
        for place, row in enumerate(torch.split(rows, 1)):
            token = answer.draw(row)
            answer.say(token, row)
            if token in eos or (place < len(draft) and token != draft[place]):
                exact.release(sequence)  # it has read what was not said, or nothing follows
                break
        else:
            sequence.blocks.tokens.append(token)
            held[id(answer)] = sequence


def _admitted(cache: Replay, answer: Answer) -> EngineSequence:
    return cache.admit((*answer.prompt, *answer.spoken))

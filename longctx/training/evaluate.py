"""Measures how well a needle checkpoint finds needles: `python -m longctx.training.evaluate`.

Filler is Python's standard library, keys and values are the held-out half: training saw neither.
An answer counts when the whole value is right, character for character. Intervals are
Wilson's, 95%; `depth p` is the chance of as much change of accuracy with depth where there is none.
The last line is compact JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from longctx.embedded import model_path
from longctx.needles import generator
from longctx.training import corpus
from longctx.training.reader import Reader
from longctx.training.tokenizer import BOS, SPECIALS

TASKS = ("single", "number", "distractors", "absent", *generator.RULER_TASKS)
RULER_PER_TEXT = 10
MIX = ("number", "number", "number", "word", "person", "place", "code", "date", "activity", "ruler")


@dataclass(slots=True)
class Trial:
    """One question: the answers wanted, the text that came, and the needle's depth in [0, 1]."""

    wanted: tuple[str, ...]
    got: str
    depth: float
    kind: str
    question: str

    @property
    def right(self) -> bool:
        """Whether every wanted value came, and nothing else where one was wanted."""
        if len(self.wanted) == 1:
            return self.got == self.wanted[0]
        return all(value in self.got for value in self.wanted)


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Compute the 95% interval of a proportion."""
    if not count:
        return 0.0, 1.0
    z, share = 1.96, hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * (share * (1 - share) / count + z * z / (4 * count**2)) ** 0.5 / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def depth_trend(cells: Iterable[Sequence[Trial]]) -> float:
    """Compute the two-sided p of the score test for a logistic slope over depth, over all cells.

    Each cell has its own accuracy; the score is the sum of (right - accuracy) * (depth - mean).
    """
    score = variance = 0.0
    for trials in cells:
        accuracy = sum(trial.right for trial in trials) / len(trials)
        mean = sum(trial.depth for trial in trials) / len(trials)
        score += sum((trial.right - accuracy) * (trial.depth - mean) for trial in trials)
        squares = sum((trial.depth - mean) ** 2 for trial in trials)
        variance += accuracy * (1 - accuracy) * squares
    return math.erfc(abs(score) / math.sqrt(2 * variance)) if variance else 1.0


class Filler:
    """Text never trained on, to be cut to a number of tokens.

    Haystacks that take much of it follow one another, so that they share nothing.
    """

    def __init__(self, reader: Reader, text: str) -> None:
        self.text = text
        encoding = reader.tokenizer.encode(text, add_special_tokens=False)
        self.starts = [start for start, _ in encoding.offsets]

    def cut(self, rng: random.Random, tokens: int, number: int) -> str:
        """Cut filler for haystack `number`. Raises ValueError where there is too little of it."""
        if tokens >= len(self.starts):
            raise ValueError(f"only {len(self.starts)} tokens of filler for {tokens}")
        if tokens * 4 > len(self.starts):
            first = number % (len(self.starts) // (tokens + 1)) * tokens
        else:
            first = rng.randrange(len(self.starts) - tokens)
        return self.text[self.starts[first] : self.starts[first + tokens]]


def plant(rng: random.Random, text: str, statements: list[str]) -> tuple[str, list[float]]:
    """Spread the statements over the whole text, at most one in each equal part of it."""
    count = len(statements)
    depths = [(i + rng.random()) / count for i in range(count)]
    rng.shuffle(depths)
    return generator.insert(text, statements, depths), depths


def needle_cell(
    reader: Reader, filler: Filler, task: str, tokens: int, seed: int, per_text: int, codec: str
) -> Iterator[Trial]:
    """Try one haystack with `per_text` needles (each with 8 distractors, if that is the task)."""
    rng = random.Random(f"{task} {tokens} {seed}")
    targets: list[generator.Needle] = []
    statements: list[str] = []
    keys: set[tuple[str, str]] = set()
    while len(targets) < per_text:
        kind = "number" if task == "number" else rng.choice(MIX)
        new = generator.needle(rng.getrandbits(48), kind=kind)
        group = [new]
        if task == "distractors":
            group += generator.distractors(new, 8, rng.getrandbits(48))
        names = {(needle.attribute, needle.key) for needle in group}
        if names & keys:
            continue
        keys |= names
        targets.append(new)
        statements += [needle.statement for needle in group if task != "absent"]
    used = sum(len(reader.encode(text)) + 1 for text in statements)
    text, depths = plant(rng, filler.cut(rng, tokens - used - 8, seed), statements)
    memory = reader.read(reader.document(text), codec)
    answers = reader.answer(memory, [reader.question(needle.question) for needle in targets])
    each = len(statements) // per_text
    for i, (needle, ids) in enumerate(zip(targets, answers, strict=True)):
        yield Trial(
            wanted=(generator.NOT_MENTIONED if task == "absent" else needle.answer,),
            got=reader.tokenizer.decode(ids),
            depth=depths[i * each] if depths else 0.0,
            kind=needle.kind,
            question=needle.question,
        )


def ruler_cell(
    reader: Reader, filler: Filler, task: str, tokens: int, seed: int, codec: str
) -> Iterator[Trial]:
    """Try RULER examples: introduction, text and question in one message, as RULER has it.

    `RULER_PER_TEXT` examples share a text, each the others' distractors: harder than RULER.
    """
    rng = random.Random(f"{task} {tokens} {seed}")
    cases: list[generator.RulerCase] = []
    keys: set[str] = set()
    while len(cases) < RULER_PER_TEXT:
        case = generator.ruler(task, rng.getrandbits(48))
        names = {needle.rpartition(" for ")[2].partition(" is: ")[0] for needle in case.needles}
        if not names & keys:
            keys |= names
            cases.append(case)
    statements = [needle for case in cases for needle in case.needles]
    used = sum(len(reader.encode(text)) + 1 for text in (*statements, cases[0].intro)) + 60
    if task == "niah_single_1":
        noise = generator.RULER_NOISE + "\n"
        text = noise * ((tokens - used) // len(reader.encode(noise)))
    else:
        text = filler.cut(rng, tokens - used, seed)
    text, depths = plant(rng, text, statements)
    head = reader.question(f"{cases[0].intro}\n{text}")[:-1]
    memory = reader.read([SPECIALS.index(BOS), *head], codec)
    questions = [[*reader.encode("\n"), *reader.question(case.question)[1:]] for case in cases]
    places = dict(zip(statements, depths, strict=True))
    for case, ids in zip(cases, reader.answer(memory, questions, 160), strict=True):
        wanted = [s for s in case.needles if any(f" is: {a}." in s for a in case.answers)]
        yield Trial(
            wanted=case.answers,
            got=reader.tokenizer.decode(ids),
            depth=places[wanted[0]],
            kind=task,
            question=case.question,
        )


def run_cell(
    reader: Reader, filler: Filler, task: str, tokens: int, codec: str, questions: int, texts: int
) -> list[Trial]:
    """Run at least `questions` trials over at least `texts` haystacks."""
    trials: list[Trial] = []
    each = 9 if task == "distractors" else 1
    room = max(1, tokens // (110 * each))  # needles never make up most of a text
    per_text = max(1, min(-(-questions // texts), room))
    seed = 0
    while len(trials) < questions:
        if task in generator.RULER_TASKS:
            trials += ruler_cell(reader, filler, task, tokens, seed, codec)
        else:
            trials += needle_cell(reader, filler, task, tokens, seed, per_text, codec)
        seed += 1
    return trials


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """All trials of one task, length and codec."""

    task: str
    tokens: int
    codec: str
    trials: list[Trial]

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return sum(trial.right for trial in self.trials) / len(self.trials)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the accuracy."""
        return wilson(sum(trial.right for trial in self.trials), len(self.trials))

    @property
    def thirds(self) -> list[str]:
        """Right and all answers in each third of the depth, such as `31/33`."""
        thirds = []
        for third in range(3):
            part = [t.right for t in self.trials if int(t.depth * 2.9999) == third]
            thirds.append(f"{sum(part)}/{len(part)}")
        return thirds

    def print_row(self, seconds: float, failures: int) -> None:
        """Print a line of the table, and the first `failures` wrong answers below it."""
        low, high = self.interval
        print(
            f"{self.task:16}{self.tokens:>9} {self.codec:6}{len(self.trials):>5}"
            f"{self.accuracy:>8.3f}  {low:.3f} - {high:.3f}  {' '.join(self.thirds)}"
            f"  {depth_trend([self.trials]):.2f}  {seconds:.0f} s",
            flush=True,
        )
        for trial in [t for t in self.trials if not t.right][:failures]:
            print(f"    {trial.question!r} wanted {trial.wanted} got {trial.got!r}")

    def record(self) -> dict[str, object]:
        """Return the cell's part of the JSON line."""
        low, high = self.interval
        return {
            "metric": f"{self.task} exact match",
            "value": round(self.accuracy, 4),
            "unit": "share",
            "tokens": self.tokens,
            "codec": self.codec,
            "n": len(self.trials),
            "low": round(low, 4),
            "high": round(high, 4),
            "by_depth_third": self.thirds,
            "depth_p": round(depth_trend([self.trials]), 4),
        }


def main() -> None:
    """Evaluate what the command line asks for: a table for people, then a line of JSON."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    reader = Reader(args.model)
    filler = Filler(reader, corpus.stdlib_text(0, max(2_000_000, max(args.tokens) * 9)))
    print(
        f"{'task':16}{'tokens':>9} {'codec':6}{'n':>5}{'right':>8}  95% interval"
        "   by depth third  depth p"
    )
    cells = []
    for task, tokens, codec in itertools.product(args.tasks, args.tokens, args.codecs):
        begun = time.monotonic()
        trials = run_cell(reader, filler, task, tokens, codec, args.questions, args.texts)
        cells.append(Cell(task=task, tokens=tokens, codec=codec, trials=trials))
        cells[-1].print_row(time.monotonic() - begun, args.failures)
    summary = {
        "bench": "needle",
        "depth_p": round(depth_trend(cell.trials for cell in cells), 4),
        "machine": platform.processor() or platform.machine(),
        "results": [cell.record() for cell in cells],
    }
    print(json.dumps(summary, separators=(",", ":")))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=model_path("needle"))
    parser.add_argument("--tasks", nargs="+", default=["single", "distractors"], choices=TASKS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 8192, 32768])
    parser.add_argument("--codecs", nargs="+", default=["raw"], choices=("raw", "int8", "int4"))
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--texts", type=int, default=5, help="haystacks per cell, at least")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--failures", type=int, default=0, help="print this many wrong answers")
    return parser.parse_args()


if __name__ == "__main__":
    main()

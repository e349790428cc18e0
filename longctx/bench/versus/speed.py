"""Speed and memory of several engines on one model: who reads and decodes faster, by turns.

All engines are loaded at once, each in its own process, and answer the same random prompts one
after another, in an order that turns each round: a machine that gets slower for a while slows
all, and the median of the rounds counts. Then each is asked alone about one long prompt: its first
question, others after it, and others after its process has ended and another one started.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from longctx.bench.versus.contender import Answer, Contender, Engine, running
from longctx.errors import LongctxError

WARM_UP_TOKENS = 64
QUESTION_TOKENS = 32


@dataclass(slots=True)
class Speed:
    """What one engine took for prompts of one length: an entry per round, in seconds."""

    prefill: list[float] = field(default_factory=list)
    interval: list[float] = field(default_factory=list)
    token_ids: list[tuple[int, ...]] = field(default_factory=list)


@dataclass(slots=True)
class Questions:
    """Seconds to first tokens about one long prompt; empty where an engine keeps nothing."""

    tokens: int
    cold: float = 0.0
    warm: list[float] = field(default_factory=list)
    restored: list[float] = field(default_factory=list)  # reading it back included
    stored_bytes: int | None = None
    peak_bytes: int | None = None


@dataclass(slots=True)
class Measured:
    """Everything of one engine. An engine that failed says so in `failure` and has the rest."""

    about: dict[str, object] = field(default_factory=dict)
    speeds: dict[int, Speed] = field(default_factory=dict)  # by prompt length
    questions: Questions | None = None
    failure: str | None = None


def measure_speeds(
    own: Contender,
    rivals: Sequence[Engine],
    found: dict[str, Measured],
    lengths: Sequence[int],
    *,
    new_tokens: int,
    rounds: int,
    vocab_size: int,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Have longctx, which runs, and the rivals answer the same prompts by turns; fill `found`.

    A rival that fails is left out from then on, and said. Raises LongctxError for longctx's own
    failure.
    """

    def give_up(name: str, error: LongctxError) -> None:
        if name == own.name:
            raise error
        found[name].failure = str(error)
        say(f"{name} is left out: {error}")

    with ExitStack() as stack:
        contenders = [own]
        for engine in rivals:
            say(f"{engine.name}: loading")
            try:
                contenders.append(stack.enter_context(running(engine)))
            except LongctxError as error:
                give_up(engine.name, error)
        for contender in contenders:
            found[contender.name].about = contender.about
        for length in lengths:
            say(f"prompts of {length:,} tokens")
            for number in range(-1, rounds):
                # Round -1 only warms up
                tokens = length if number >= 0 else min(length, WARM_UP_TOKENS)
                rng = random.Random(f"prompt {seed} {length} {number}")
                prompt = random_tokens(rng, tokens, vocab_size)
                turn = number % len(contenders)
                for contender in (*contenders[turn:], *contenders[:turn]):
                    try:
                        answer = contender.answer(prompt, new_tokens)
                    except LongctxError as error:
                        give_up(contender.name, error)
                        contenders.remove(contender)
                        continue
                    if number >= 0:
                        _note(found[contender.name].speeds.setdefault(length, Speed()), answer)


def measure_questions(
    engine: Engine,
    found: Measured,
    tokens: int,
    *,
    rounds: int,
    vocab_size: int,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Ask about one prompt of `tokens` tokens in a fresh process, and again after restarts."""
    if found.failure is not None:
        return
    rng = random.Random(f"document {seed} {tokens}")
    document = random_tokens(rng, tokens - QUESTION_TOKENS, vocab_size)
    warm_up = random_tokens(rng, WARM_UP_TOKENS, vocab_size)

    def ask(contender: Contender) -> float:
        question = random_tokens(rng, QUESTION_TOKENS, vocab_size)
        return contender.answer((*document, *question), 1).first_token_seconds

    say(f"{engine.name}: questions on {tokens:,} tokens")
    questions = Questions(tokens)
    try:
        with TemporaryDirectory(prefix="longctx-versus-") as folder:
            with running(engine) as contender:
                contender.answer(warm_up, 1)  # the first answer of an engine is always slow
                questions.cold = ask(contender)
                questions.peak_bytes = contender.peak_bytes()
                if contender.about["keeps"]:
                    questions.warm = [ask(contender) for _ in range(rounds)]
                saves = bool(contender.about["saves"])
                if saves:
                    questions.stored_bytes = contender.save(Path(folder))
            for _ in range(rounds if saves else 0):
                with running(engine) as contender:
                    contender.answer(warm_up, 1)
                    read_seconds = contender.restore(Path(folder))
                    questions.restored.append(read_seconds + ask(contender))
    except LongctxError as error:
        if engine.own:
            raise
        found.failure = str(error)
        say(found.failure)
    if questions.cold:
        found.questions = questions


def same_tokens(ours: Speed, theirs: Speed) -> float:
    """Return the share of tokens, over all rounds, on which both agree."""
    pairs = [
        mine == other
        for mine_all, other_all in zip(ours.token_ids, theirs.token_ids, strict=False)
        for mine, other in zip(mine_all, other_all, strict=True)
    ]
    return sum(pairs) / len(pairs)


def middle(seconds: Sequence[float]) -> float | None:
    """Return the median; None of nothing."""
    return median(seconds) if seconds else None


def random_tokens(rng: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, vocab_size) for _ in range(count))


def _note(speed: Speed, answer: Answer) -> None:
    speed.prefill.append(answer.first_token_seconds)
    speed.interval.append(answer.interval_seconds)
    speed.token_ids.append(answer.token_ids)

"""What a document costs once, and what a question on it costs then.

- cold: a question on a document that nobody has read; all of it is computed first.
- warm: another question on it. Only the question may be computed.
- hot prefix: the same question after other text of the same length that is cached as an ordinary
  prompt: how fast it can be when the document is nothing special.
- submit, calls: Python's own work per question, which must not grow with the document.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import FrameType

import numpy as np
from rich.table import Table

from longctx.bench.config import BenchConfig, DocumentConfig, RoundsConfig
from longctx.bench.haystack import document as document_text
from longctx.bench.picture import Series, draw_first_tokens
from longctx.bench.report import Parameter, Report, Result, model_parameters
from longctx.bench.timing import Stopwatch
from longctx.config import EngineConfig
from longctx.llm import LLM
from longctx.needles.generator import needle
from longctx.request import SamplingParams, Segment, Usage
from longctx.text.chat_template import ChatPrompts, FilePart, Message

FIRST_TOKEN = SamplingParams(max_tokens=1, temperature=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What one question took.

    Both times begin with its text: `first_token_seconds` ends with the answer's first token,
    `submit_seconds` when the engine has taken the request.
    """

    first_token_seconds: float
    submit_seconds: float
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What one document cost. Lists have an entry per round, each with another question."""

    tokens: int
    cold: Asked
    warm: list[Asked]
    hot: list[Asked]
    python_calls: int  # of one warm question, down to its first token

    @property
    def warm_seconds(self) -> float:
        return median(asked.first_token_seconds for asked in self.warm)

    @property
    def hot_seconds(self) -> float:
        return median(asked.first_token_seconds for asked in self.hot)

    @property
    def computed_tokens(self) -> int:
        return max(asked.usage.computed_tokens for asked in self.warm)

    @property
    def submit_seconds(self) -> float:
        return median(asked.submit_seconds for asked in self.warm)


def run(
    engine: EngineConfig,
    bench: BenchConfig,
    rounds: RoundsConfig,
    config: DocumentConfig,
    *,
    say: Callable[[str], None],
) -> Report:
    """Measures a document of each length on one engine. Raises LongctxError."""
    llm = LLM(config=engine)
    asker = Asker(llm)
    # The first answer of an engine is always slow: no document should pay for it
    asker.costs(256, rounds=1, seed=bench.seed - 1)
    costs = []
    for tokens in config.token_lengths:
        costs.append(asker.costs(tokens, rounds=rounds.rounds, seed=bench.seed))
        say(f"document of {costs[-1].tokens:,} tokens done")
    parameters = model_parameters(llm.engine.info)
    subtitle = ", ".join(parameters.values())
    return Report(
        results=tuple(row for each in costs for row in _results(each, parameters)),
        tables=(_table(costs, subtitle),),
        draw=partial(_draw, costs, subtitle),
    )


class Asker:
    """Asks about documents of one engine that nobody else uses meanwhile.

    `costs` opens a document, takes all measurements of it, and closes it again.
    """

    def __init__(self, llm: LLM) -> None:
        self._engine = llm.engine
        self._stopwatch = Stopwatch(llm.engine)
        self._prompts = ChatPrompts(llm.engine.tokenizer)

    def costs(self, tokens: int, *, rounds: int, seed: int) -> Costs:
        """Measures a document of at most `tokens` tokens that this engine has not read."""
        encode = self._engine.tokenizer.encode
        text = document_text(tokens, seed=seed, count_tokens=lambda text: len(encode(text)))
        token_ids = np.array(encode(text), dtype=np.int32)
        document_id = f"document-{tokens}-{seed}"
        self._engine.open_document(document_id, token_ids)
        part = FilePart(document_id, "document.txt")
        # Other text of the same length: the second half before the first
        other = tuple(np.roll(token_ids, len(token_ids) // 2).tolist())
        questions = [needle(seed + number).question for number in range(rounds + 2)]

        cold = self._ask(part, questions[0])
        self._ask(part, questions[0], instead=other)
        warm: list[Asked] = []
        hot: list[Asked] = []
        for number, question in enumerate(questions[1:-1]):
            takes: list[tuple[list[Asked], tuple[int, ...] | None]] = [(warm, None), (hot, other)]
            for asked, instead in takes if number % 2 else reversed(takes):
                asked.append(self._ask(part, question, instead=instead))
        calls = count_calls(lambda: self._ask(part, questions[-1]))
        self._engine.close_document(document_id)
        return Costs(tokens=len(token_ids), cold=cold, warm=warm, hot=hot, python_calls=calls)

    def _ask(
        self, part: FilePart, question: str, *, instead: tuple[int, ...] | None = None
    ) -> Asked:
        """Asks one question; `instead` puts literal tokens into the document's place."""
        began = time.perf_counter()
        segments = self._prompts.render([Message("user", (part, question))])
        if instead is not None:
            prompt = [
                token
                for segment in segments
                for token in (instead if segment.document_id else segment.token_ids)
            ]
            segments = (Segment(token_ids=tuple(prompt)),)
        rendered = time.perf_counter() - began
        answer = self._stopwatch.ask(segments, FIRST_TOKEN)
        return Asked(
            first_token_seconds=rendered + answer.first_token_seconds,
            submit_seconds=rendered + answer.submit_seconds,
            usage=answer.usage,
        )


def count_calls(work: Callable[[], object]) -> int:
    """Counts the calls of Python and C functions that `work` makes in this thread."""
    calls = 0

    def observe(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(observe)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


def _results(costs: Costs, model: Mapping[str, Parameter]) -> Iterator[Result]:
    parameters: dict[str, Parameter] = {**model, "document_tokens": costs.tokens}
    many: dict[str, Parameter] = {**parameters, "rounds": len(costs.warm)}
    yield Result(
        metric="cold first token",
        value=costs.cold.first_token_seconds,
        unit="s",
        parameters=parameters,
    )
    yield Result(
        metric="warm first token",
        value=costs.warm_seconds,
        unit="s",
        parameters=many,
        baseline="cold first token",
        baseline_value=costs.cold.first_token_seconds,
    )
    yield Result(
        metric="first token after a hot plain prefix",
        value=costs.hot_seconds,
        unit="s",
        parameters=many,
    )
    for metric, value, unit in (
        ("warm over hot plain prefix", costs.warm_seconds / costs.hot_seconds, "x"),
        ("computed tokens of a warm question", costs.computed_tokens, "tokens"),
        ("cached tokens", min(asked.usage.cached_tokens for asked in costs.warm), "tokens"),
        ("submit", 1000 * costs.submit_seconds, "ms"),
        ("Python calls of a warm question", costs.python_calls, "calls"),
    ):
        yield Result(metric=metric, value=value, unit=unit, parameters=many)


def _table(costs: Sequence[Costs], subtitle: str) -> Table:
    table = Table(
        title="A question on a document, time to its first token",
        caption=f"{subtitle}; hot: the same after an ordinary cached prompt of that length",
    )
    for name in ("document", "cold", "warm", "saved", "hot", "computed", "submit", "calls"):
        table.add_column(name, justify="right")
    for each in costs:
        table.add_row(
            f"{each.tokens:,}",
            f"{each.cold.first_token_seconds:.2f} s",
            f"{1000 * each.warm_seconds:.0f} ms",
            f"{each.cold.first_token_seconds / each.warm_seconds:,.0f}x",
            f"{1000 * each.hot_seconds:.0f} ms",
            f"{each.computed_tokens}",
            f"{1000 * each.submit_seconds:.2f} ms",
            f"{each.python_calls:,}",
        )
    return table


def _draw(costs: Sequence[Costs], subtitle: str, path: Path) -> None:
    draw_first_tokens(
        path,
        subtitle=subtitle,
        lengths=[each.tokens for each in costs],
        series=(
            Series(label="warm: document read", values=[each.warm_seconds for each in costs]),
            Series(label="hot plain prefix", values=[each.hot_seconds for each in costs]),
            Series(label="cold", values=[each.cold.first_token_seconds for each in costs]),
        ),
    )

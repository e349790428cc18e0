"""Requests to be scheduled: drawn from a seed, or read from a file of arrival times.

A file has the columns of the public Azure LLM inference traces: TIMESTAMP, ContextTokens and
GeneratedTokens (https://github.com/Azure/AzurePublicDataset).
"""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from random import Random

from longctx.bench.config import ScheduleConfig
from longctx.engine.cost_model import CostModel, StepWork
from longctx.errors import InvalidRequest
from longctx.request import RequestClass

SHORT_TOKENS = 2048  # prompts up to here are the short ones, whose first token counts
COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
LONG_PROMPTS = 0.02  # of the requests; the other ones are chats
DOCUMENT_TOKENS = (16_384, 131_072)  # of those that are read, beside the longest one
FORMS = (4, 60, 240)  # half of the answers to prompts of each form are longer
MOST_ANSWER_TOKENS = 2000


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of a trace: when it comes, and how many tokens it reads and answers.

    `form` says which prompts are alike, so that their answers are about as long.
    """

    seconds: float
    prompt_tokens: int
    answer_tokens: int  # 0: a document, which is only read
    form: int = 0

    @property
    def request_class(self) -> RequestClass:
        return RequestClass.INTERACTIVE if self.answer_tokens else RequestClass.INGEST

    @property
    def short(self) -> bool:
        return self.answer_tokens > 0 and self.prompt_tokens <= SHORT_TOKENS


def chats(choose: Random, count: int, *, long: float = LONG_PROMPTS) -> Iterator[Arrival]:
    """Yield chats, and long prompts as that part of them, all at the same time."""
    for _ in range(count):
        form = choose.randrange(len(FORMS))
        answer = choose.lognormvariate(math.log(FORMS[form]), 0.5)
        if choose.random() < long:
            prompt = min(32_768.0, choose.lognormvariate(math.log(8192), 0.7))
        else:
            prompt = min(float(SHORT_TOKENS), choose.lognormvariate(math.log(150), 0.9))
        most = min(MOST_ANSWER_TOKENS, max(1, round(answer)))
        yield Arrival(0.0, max(1, round(prompt)), most, form)


def mixed(config: ScheduleConfig, cost: CostModel, *, seed: int) -> list[Arrival]:
    """Draw chats that come all the time, and documents among them, one of them very long.

    They come at such a rate that those without the longest one take `busy` of the machine's time.
    """
    choose = Random(seed)
    asked = list(chats(choose, config.requests - config.documents_read))
    low, high = map(math.log, DOCUMENT_TOKENS)
    for _ in range(config.documents_read - 1):
        asked.append(Arrival(0.0, round(math.exp(choose.uniform(low, high))), 0))
    span = sum(alone_seconds(each, cost) for each in asked) / config.busy
    trace = [at(each, choose.uniform(0, span)) for each in asked]
    if config.documents_read:
        trace.append(Arrival(0.2 * span, config.longest_tokens, 0))
    return sorted(trace, key=lambda each: each.seconds)


def crowded(requests: int, cost: CostModel, *, busy: float, seed: int) -> list[Arrival]:
    """Draw chats alone, which take `busy` of the machine's time where many share each step."""
    choose = Random(seed)
    asked = list(chats(choose, requests, long=0.0))
    span = sum(alone_seconds(each, cost, beside=16) for each in asked) / busy
    trace = [at(each, choose.uniform(0, span)) for each in asked]
    return sorted(trace, key=lambda each: each.seconds)


def beside_chats(
    tokens: int, hours: float, documents: float, chats_per_second: float, *, seed: int
) -> list[Arrival]:
    """Draw documents of one length, so many an hour, beside chats that come all the time."""
    choose = Random(seed)
    span = 3600 * hours
    asked = [Arrival(0.0, tokens, 0)] * max(1, round(documents * hours))
    asked += chats(choose, round(span * chats_per_second))
    trace = [at(each, choose.uniform(0, span)) for each in asked]
    return sorted(trace, key=lambda each: each.seconds)


def at(arrival: Arrival, seconds: float) -> Arrival:
    """Let the same request come at another time."""
    return Arrival(seconds, arrival.prompt_tokens, arrival.answer_tokens, arrival.form)


def alone_seconds(arrival: Arrival, cost: CostModel, *, beside: int = 4) -> float:
    """How long a request takes of the machine, where so many answers share each step."""
    work = StepWork()
    work.add_prompt(arrival.prompt_tokens, 0)
    for _ in range(beside):
        work.add_answer(arrival.prompt_tokens)
    answer = StepWork()
    for _ in range(beside):
        answer.add_answer(arrival.prompt_tokens)
    prompt_seconds = cost.chunk_seconds(arrival.prompt_tokens, 0)
    return prompt_seconds + arrival.answer_tokens * cost.seconds(answer) / beside


def read_trace(path: Path) -> list[Arrival]:
    """Read a file of arrivals; the first one is at 0 seconds. Raises InvalidRequest."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise InvalidRequest(f"{path} has no requests; each line after the first is one")
        times = [datetime.fromisoformat(row[COLUMNS[0]]).timestamp() for row in rows]
        counts = [(int(row[COLUMNS[1]]), int(row[COLUMNS[2]])) for row in rows]
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(
            f"{path} is no trace: {error!r}; its columns are {', '.join(COLUMNS)}, a time such as "
            "2023-11-16 18:15:46.6805900 and two whole numbers"
        ) from error
    begin = min(times)
    return sorted(
        (
            Arrival(seconds - begin, max(1, prompt), max(0, answer))
            for seconds, (prompt, answer) in zip(times, counts, strict=True)
        ),
        key=lambda each: each.seconds,
    )

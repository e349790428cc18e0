"""One sequence, prefill and decode, against `transformers.generate` in the same process and run.

Rounds alternate between the two, so that a machine that gets slower for a while slows both; the
median of the rounds counts. Both get the same random prompt, dtype and threads, both choose
greedily. transformers runs as it comes: SDPA attention, DynamicCache. A new prompt each round
keeps the prefix cache out of it.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.table import Table

from longctx.bench.config import DecodeConfig
from longctx.bench.picture import Series, draw_bars
from longctx.bench.report import Parameter, Report, Result
from longctx.bench.timing import Stopwatch
from longctx.bench.versus.workers.with_transformers import Contender
from longctx.config import EngineConfig
from longctx.errors import InvalidRequest
from longctx.llm import LLM
from longctx.request import SamplingParams, Segment

BASELINE = "transformers.generate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One answer: seconds to its first token, mean seconds between tokens, and its tokens."""

    first_token_seconds: float
    interval_seconds: float
    token_ids: tuple[int, ...]


@dataclass(slots=True)
class Duel:
    """All rounds at one context length; the n-th entries of both sides had the same prompt."""

    ours: list[Timing] = field(default_factory=list)
    theirs: list[Timing] = field(default_factory=list)

    @property
    def same_tokens(self) -> float:
        """The share of tokens, over all rounds, on which both sides agree."""
        pairs = [
            mine == other
            for ours, theirs in zip(self.ours, self.theirs, strict=True)
            for mine, other in zip(ours.token_ids, theirs.token_ids, strict=True)
        ]
        return sum(pairs) / len(pairs)


def run_duels(
    engine: EngineConfig,
    seed: int,
    rounds: int,
    decode: DecodeConfig,
    folder: Path,
    *,
    say: Callable[[str], None],
) -> Report:
    if engine.model.rope_override is not None:
        raise InvalidRequest("transformers would not get --rope-override; leave it out here")
    llm = LLM(folder, engine)
    info = llm.engine.info
    ours = Ours(llm)
    theirs = Theirs(folder, dtype=info.dtype, device=info.device)
    duels = {
        context: duel(ours, theirs, context, rounds, decode.new_tokens, info.vocab_size, seed)
        for context in _announced(decode.token_lengths, say)
    }
    parameters: dict[str, Parameter] = {
        "model": "random Llama " + decode.model_size
        if engine.model.model is None
        else info.model_name,
        "dtype": info.dtype,
        "device": info.device,
        "kv_codec": info.kv_codec,
        "backend": info.backend,
        "threads": torch.get_num_threads(),
    }
    rows = tuple(_results(duels, parameters))
    title = ", ".join(str(parameters[name]) for name in ("model", "dtype", "kv_codec", "device"))
    subtitle = f"{title}, {parameters['threads']} threads"
    return Report(
        results=rows, tables=(_table(rows, subtitle),), draw=partial(_draw, rows, subtitle)
    )


def duel(
    ours: "Ours",
    theirs: "Theirs",
    context: int,
    rounds: int,
    new_tokens: int,
    vocab_size: int,
    seed: int,
) -> Duel:
    """Has `rounds` prompts of `context` random tokens answered by both sides."""
    result = Duel()
    for number in range(-1, rounds):
        rng = random.Random(f"prompt {seed} {context} {number}")
        length = context if number >= 0 else min(context, 64)  # round -1 only warms up
        prompt = tuple(rng.randrange(3, vocab_size) for _ in range(length))
        takes: list[tuple[Ours | Theirs, list[Timing]]] = [
            (ours, result.ours),
            (theirs, result.theirs),
        ]
        for engine, timings in takes if number % 2 else reversed(takes):
            timing = engine.answer(prompt, new_tokens)
            if number >= 0:
                timings.append(timing)
    return result


class Ours:
    """longctx's side of a duel."""

    def __init__(self, llm: LLM) -> None:
        self._stopwatch = Stopwatch(llm.engine)

    def answer(self, prompt: tuple[int, ...], new_tokens: int) -> Timing:
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        answer = self._stopwatch.ask((Segment(token_ids=prompt),), sampling)
        assert answer.usage.cached_tokens == 0, "the prompt was seen before"
        return Timing(
            first_token_seconds=answer.first_token_seconds,
            interval_seconds=answer.token_interval_seconds,
            token_ids=answer.token_ids,
        )


class Theirs:
    """`transformers.generate`, as it comes, on the same folder."""

    def __init__(self, folder: Path, *, dtype: str, device: str) -> None:
        self._contender = Contender(
            str(folder), torch.get_num_threads(), context=0, dtype=dtype, device=device
        )

    def answer(self, prompt: tuple[int, ...], new_tokens: int) -> Timing:
        told = self._contender.answer(list(prompt), new_tokens)
        seconds = told["seconds"]
        assert len(seconds) == new_tokens, "generate stopped early"
        return Timing(
            first_token_seconds=seconds[0],
            interval_seconds=(seconds[-1] - seconds[0]) / (new_tokens - 1),
            token_ids=tuple(told["token_ids"]),
        )


def _announced(contexts: tuple[int, ...], say: Callable[[str], None]) -> Iterator[int]:
    for context in contexts:
        say(f"prompts of {context:,} tokens")
        yield context


def _results(duels: dict[int, Duel], parameters: Mapping[str, Parameter]) -> Iterator[Result]:
    for context, rounds in duels.items():
        at: dict[str, Parameter] = {
            **parameters,
            "context_tokens": context,
            "rounds": len(rounds.ours),
        }
        new_tokens = len(rounds.ours[0].token_ids)
        yield Result(
            metric="decode",
            value=1000 * median(timing.interval_seconds for timing in rounds.ours),
            unit="ms/token",
            parameters={**at, "new_tokens": new_tokens},
            baseline=BASELINE,
            baseline_value=1000 * median(timing.interval_seconds for timing in rounds.theirs),
        )
        yield Result(
            metric="prefill",
            value=median(timing.first_token_seconds for timing in rounds.ours),
            unit="s",
            parameters=at,
            baseline=BASELINE,
            baseline_value=median(timing.first_token_seconds for timing in rounds.theirs),
        )
        yield Result(
            metric="same tokens",
            value=rounds.same_tokens,
            unit="share",
            parameters={**at, "new_tokens": new_tokens},
        )


def _table(rows: Sequence[Result], subtitle: str) -> Table:
    table = Table(title="One sequence", caption=f"{subtitle}; above 1x longctx is faster")
    for name in ("", "context", "longctx", "transformers", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        context = f"{row.parameters['context_tokens']:,}"
        if row.baseline_value is None or row.ratio is None:
            table.add_row(row.metric, context, f"{row.value:.0%}", "", "")
            continue
        digits = 3 if row.unit == "s" else 1
        table.add_row(
            row.metric,
            context,
            f"{row.value:.{digits}f} {row.unit}",
            f"{row.baseline_value:.{digits}f} {row.unit}",
            f"{row.ratio:.2f}x",
        )
    return table


def _draw(rows: Sequence[Result], subtitle: str, path: Path) -> None:
    decoded = [row for row in rows if row.metric == "decode"]
    draw_bars(
        path,
        title="Time per decoded token",
        subtitle=subtitle,
        groups=[f"after {row.parameters['context_tokens']:,}" for row in decoded],
        series=(
            Series(label="longctx", values=[row.value for row in decoded]),
            Series(label=BASELINE, values=[row.baseline_value for row in decoded]),
        ),
        unit="ms",
    )

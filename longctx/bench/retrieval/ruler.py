"""RULER: needles among needles, chains of variables, words to count; in process, or on a server.

Each prompt is one message of the user and as long as the length allows, its answer included; the
model's own chat template goes around it. An answer's score is the share of the wanted strings that
are in it. Read `measure`; the tasks are `longctx/needles/ruler_tasks.py`.
Source: https://arxiv.org/abs/2404.06654
Differs: the beginning of the answer ends the user's message, as the paper's own client of such
servers has it, since not every server can go on with an answer that was begun.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from longctx.bench.config import AskedConfig, BenchConfig, FillerConfig, RulerConfig
from longctx.bench.picture import draw_heat_map
from longctx.bench.report import Parameter, Report, Result
from longctx.bench.retrieval.journal import Journal
from longctx.bench.retrieval.subject import LocalSubject, ServerSubject, Subject
from longctx.bench.retrieval.texts import filler
from longctx.bench.scores import recall, wilson
from longctx.config import EngineConfig
from longctx.errors import InvalidRequest
from longctx.llm import LLM
from longctx.needles.ruler_tasks import TASKS, Draft, TooShort, draft, fit, read_passages

FORM = 1  # of the prompts: answers to others are not theirs


@dataclass(frozen=True, slots=True)
class Cell:
    """The scores of one task at one length."""

    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(sum(self.scores), len(self.scores))


Cells = Mapping[tuple[str, int], Cell]


def run(
    engine: EngineConfig,
    bench: BenchConfig,
    texts: FillerConfig,
    asked: AskedConfig,
    ruler: RulerConfig,
    *,
    say: Callable[[str], None],
) -> Report:
    """Asks every sample that was not asked yet. Raises LongctxError."""
    if asked.base_url is None:
        with LLM(config=engine) as llm:
            return measure(LocalSubject(llm), bench, texts, ruler, say=say)
    if engine.model.model is not None:
        raise InvalidRequest(
            "--model loads a model into this process, and --base-url asks a server; name the "
            "server's model with --ask-model"
        )
    subject = ServerSubject(asked.base_url, asked.server_key, asked.ask_model)
    return measure(subject, bench, texts, ruler, say=say)


def measure(
    subject: Subject,
    bench: BenchConfig,
    texts: FillerConfig,
    ruler: RulerConfig,
    *,
    say: Callable[[str], None],
) -> Report:
    """Asks a subject for every sample that the journal in `bench.out` lacks."""
    sentences, text_name = filler(texts.haystack)
    try:
        passages = None if ruler.squad_file is None else read_passages(ruler.squad_file)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"--squad-file: {error}") from error
    parameters: dict[str, Parameter] = {
        **subject.parameters,
        "answer_prefix": ruler.answer_prefix,
        "haystack": text_name,
        "seed": bench.seed,
    }
    squad = None if ruler.squad_file is None else ruler.squad_file.name
    journal = Journal(
        bench.out,
        "ruler",
        {"form": FORM, **parameters, "squad_file": squad},
    )
    try:
        if journal.records:
            say(f"{len(journal.records)} answers are there already")
        for length in ruler.token_lengths:
            for task in ruler.every_task:
                for number in range(ruler.samples):
                    if (task, length, number) not in journal.records:
                        rng = random.Random(f"ruler {FORM} {bench.seed} {task} {number}")
                        sample = draft(
                            task, rng, tokens=length, sentences=sentences, passages=passages
                        )
                        prompt = _prompt(subject, task, sample, length, ruler.answer_prefix)
                        answer = _ask(subject, task, prompt, sample.answers)
                        journal.add((task, length, number), answer)
                say(_line(task, length, _cell(journal, task, length, ruler.samples)))
        journal.finish()
    finally:
        journal.close()
    cells = {
        (task, length): _cell(journal, task, length, ruler.samples)
        for length in ruler.token_lengths
        for task in ruler.every_task
    }
    counted = [
        journal.records[task, length, number]
        for task, length in cells
        for number in range(ruler.samples)
    ]
    subtitle = f"{parameters['model']}, {text_name} text; tokens: {subject.counting}"
    if notes := _notes(counted):
        subtitle += f"; {notes}"
    return Report(
        results=tuple(_results(cells, ruler, parameters, counted)),
        tables=(_table(cells, ruler, subtitle),),
        draw=partial(_draw, cells, ruler, subtitle),
    )


def _prompt(subject: Subject, task: str, sample: Draft, length: int, answer_prefix: bool) -> str:
    """Write the longest prompt that leaves room for the answer."""
    prefix = sample.answer_prefix if answer_prefix else ""
    room = length - TASKS[task].answer_tokens
    try:
        return fit(sample, room, lambda text: subject.count(text + prefix)) + prefix
    except TooShort as error:
        needed = error.needed + TASKS[task].answer_tokens
        raise InvalidRequest(
            f"{task} needs prompts of {needed:,} tokens, not {length:,}; leave the length out of "
            "--prompt-lengths, or the task out of --tasks"
        ) from error


def _ask(subject: Subject, task: str, prompt: str, answers: tuple[str, ...]) -> dict[str, Any]:
    said = subject.ask(prompt, TASKS[task].answer_tokens)
    return {
        "score": recall(said.text, answers, any_answer=TASKS[task].any_answer),
        "wanted": answers,
        "given": said.text,
        "finish_reason": said.finish_reason,
        "counted_tokens": subject.count(prompt),
        "prompt_tokens": said.prompt_tokens,
        "cached_tokens": said.cached_tokens,
        "seconds": round(said.seconds, 4),
    }


def _cell(journal: Journal, task: str, length: int, samples: int) -> Cell:
    return Cell(
        tuple(float(journal.records[task, length, number]["score"]) for number in range(samples))
    )


def _notes(records: list[dict[str, Any]]) -> str:
    """Say where the server counts otherwise: a second BOS token shows here, or a bad estimate."""
    beyond = [
        each["prompt_tokens"] - each["counted_tokens"]
        for each in records
        if each["prompt_tokens"] is not None and each["prompt_tokens"] != each["counted_tokens"]
    ]
    if not beyond:
        return ""
    return (
        f"the server counts {min(beyond):+} to {max(beyond):+} tokens in {len(beyond)} of "
        f"{len(records)} prompts"
    )


def _results(
    cells: Cells,
    ruler: RulerConfig,
    parameters: Mapping[str, Parameter],
    records: list[dict[str, Any]],
) -> Iterator[Result]:
    for length in ruler.token_lengths:
        for task in ruler.every_task:
            at = {**parameters, "task": task, "length_tokens": length}
            yield _recall(cells[task, length], at)
        at = {**parameters, "task": "all", "length_tokens": length}
        yield _recall(_together(cells, ruler, length), at)
    cut = sum(each["finish_reason"] == "length" for each in records)
    yield Result(
        metric="answers cut at their limit", value=cut, unit="answers", parameters=parameters
    )


def _together(cells: Cells, ruler: RulerConfig, length: int) -> Cell:
    return Cell(tuple(score for task in ruler.every_task for score in cells[task, length].scores))


def _recall(cell: Cell, parameters: Mapping[str, Parameter]) -> Result:
    low, high = cell.interval
    interval = {"n": len(cell.scores), "low": round(low, 4), "high": round(high, 4)}
    return Result(
        metric="recall", value=cell.mean, unit="share", parameters={**parameters, **interval}
    )


def _line(task: str, length: int, cell: Cell) -> str:
    low, high = cell.interval
    return f"{task}, {length:,} tokens: {cell.mean:.1%} ({low:.0%} to {high:.0%})"


def _table(cells: Cells, ruler: RulerConfig, subtitle: str) -> Table:
    table = Table(
        title="RULER: share of what was wanted that was given",
        caption=f"{subtitle}; {ruler.samples} prompts each; 95% intervals",
        caption_justify="left",
    )
    table.add_column("task")
    for length in ruler.token_lengths:
        table.add_column(f"{length:,} tokens", justify="center")
    for task in ruler.every_task:
        table.add_row(task, *(_interval(cells[task, length]) for length in ruler.token_lengths))
    table.add_section()
    table.add_row(
        "all", *(_interval(_together(cells, ruler, length)) for length in ruler.token_lengths)
    )
    return table


def _interval(cell: Cell) -> str:
    low, high = cell.interval
    return f"{100 * cell.mean:5.1f}%  [dim]{100 * low:.0f} to {100 * high:.0f}[/]"


def _draw(cells: Cells, ruler: RulerConfig, subtitle: str, path: Path) -> None:
    rows = [[cells[task, length] for length in ruler.token_lengths] for task in ruler.every_task]
    draw_heat_map(
        path,
        title="RULER",
        subtitle=subtitle,
        columns=[f"{length:,}" for length in ruler.token_lengths],
        rows=list(ruler.every_task),
        shares=[[cell.mean for cell in row] for row in rows],
        notes=[
            [
                f"{len(cell.scores)}, {100 * cell.interval[0]:.0f} to {100 * cell.interval[1]:.0f}%"
                for cell in row
            ]
            for row in rows
        ],
        column_label="tokens of prompt and answer",
        row_label="",
    )

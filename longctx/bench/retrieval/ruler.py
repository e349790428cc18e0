"""RULER: needles among needles, chains of variables, words to count; in process, or on a server.

Each prompt is one message of the user and as long as the length allows, its answer included; the
model's own chat template goes around it. An answer's score is the share of the wanted strings that
are in it. Read `measure`; the tasks are `longctx/needles/ruler_tasks.py`.
Source: https://arxiv.org/abs/2404.06654
Differs: the beginning of the answer ends the user's message, as the paper's own client of such
servers has it, since not every server can go on with an answer that was begun.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from longctx.bench.config import (
    AskedConfig,
    BenchConfig,
    FillerConfig,
    RulerConfig,
    VariantsConfig,
)
from longctx.bench.picture import draw_heat_map
from longctx.bench.report import Parameter, Report, Result
from longctx.bench.restart import drop_from_memory, opened
from longctx.bench.retrieval.journal import Journal
from longctx.bench.retrieval.subject import CachedSubject, LocalSubject, ServerSubject, Subject
from longctx.bench.retrieval.texts import filler
from longctx.bench.retrieval.variants import (
    Answers,
    Variant,
    difference,
    difference_results,
    difference_table,
    stored,
    told_logprobs,
)
from longctx.config import EngineConfig, KVCodec
from longctx.errors import InvalidRequest
from longctx.llm import LLM
from longctx.needles.ruler_tasks import TASKS, Draft, TooShort, draft, fit, read_passages
from longctx.needles.scores import recall, wilson

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
    variants: VariantsConfig,
    asked: AskedConfig,
    ruler: RulerConfig,
    *,
    say: Callable[[str], None],
) -> Report:
    """Asks every sample that was not asked yet. Raises LongctxError."""
    compared = variants.codecs is not None or variants.caches is not None
    if asked.base_url is None:
        if compared:
            return compare(engine, variants, bench, texts, ruler, say=say)
        with LLM(config=engine) as llm:
            return measure(LocalSubject(llm), bench, texts, ruler, say=say)
    if engine.model.model is not None or compared:
        option = "--model" if engine.model.model is not None else "--codecs or --caches"
        raise InvalidRequest(
            f"{option} is for a model in this process, and --base-url asks a server; name the "
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
    asking = _Asking(bench, texts, ruler, say)
    with asking.journal({**subject.parameters}) as journal:
        asking.ask(subject, journal)
    records = {place: journal.records[place] for place in asking.places}
    return asking.report({None: records}, subject.parameters, subject.counting)


def compare(
    engine: EngineConfig,
    variants: VariantsConfig,
    bench: BenchConfig,
    texts: FillerConfig,
    ruler: RulerConfig,
    *,
    say: Callable[[str], None],
) -> Report:
    """Asks engines of this process for every sample, of each codec and cache."""
    asking = _Asking(bench, texts, ruler, say)
    records: dict[Variant | None, Answers] = {}
    parameters: Mapping[str, Parameter] = {}
    model = "embedded" if engine.model.model is None else str(engine.model.model)
    told = {"model": model, "dtype": engine.model.dtype, "codec": engine.cache.kv_codec}
    with asking.journal({**told, **asdict(variants)}) as journal:
        for codec in variants.every_codec or (None,):
            for variant, llm in _opened(engine, variants, codec, asking, journal):
                subject = CachedSubject(llm, variant.cache)
                at = variant.key
                asking.ask(subject, journal, at)
                records[variant] = {p: journal.records[(*at, *p)] for p in asking.places}
                parameters = {**subject.parameters}
    own = {name: value for name, value in parameters.items() if name != "kv_codec"}
    return asking.report(records, own, CachedSubject.counting)


def _opened(
    engine: EngineConfig,
    variants: VariantsConfig,
    codec: KVCodec | None,
    asking: "_Asking",
    journal: Journal,
) -> Iterator[tuple[Variant, LLM]]:
    """Yield each cache's engine; that of what is restored is opened over what another one left."""
    with stored(engine, variants, codec) as config:
        with opened(config) as llm:
            own = llm.engine.info.kv_codec
            for cache in variants.every_cache:
                if cache != "restored":
                    yield Variant(own, cache), llm
            if "restored" in variants.every_cache:
                asking.read(CachedSubject(llm, "warm"), journal, (own, "restored"))
        if "restored" in variants.every_cache:
            assert config.cache.kv_dir is not None
            drop_from_memory(sorted(config.cache.kv_dir.rglob("*.kv")))
            with opened(config) as llm:
                yield Variant(own, "restored"), llm


class _Asking:
    """Asks subjects one after another for the same samples, and reports what came of it."""

    def __init__(
        self,
        bench: BenchConfig,
        texts: FillerConfig,
        ruler: RulerConfig,
        say: Callable[[str], None],
    ) -> None:
        self._bench, self._ruler, self._say = bench, ruler, say
        self._sentences, self._text_name = filler(texts.haystack)
        try:
            squad = ruler.squad_file
            self._passages = None if squad is None else read_passages(squad)
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"--squad-file: {error}") from error
        self.places = [
            (task, length, number)
            for length in ruler.token_lengths
            for task in ruler.every_task
            for number in range(ruler.samples)
        ]

    @contextmanager
    def journal(self, told: Mapping[str, Parameter]) -> Iterator[Journal]:
        """Open the journal of this run, which `told` names; finish it where nothing is raised."""
        squad = self._ruler.squad_file
        named = {"squad_file": None if squad is None else squad.name}
        journal = Journal(self._bench.out, "ruler", {"form": FORM, **told, **self._asked, **named})
        try:
            if journal.records:
                self._say(f"{len(journal.records)} answers are there already")
            yield journal
            journal.finish()
        finally:
            journal.close()

    @property
    def _asked(self) -> dict[str, Parameter]:
        return {
            "answer_prefix": self._ruler.answer_prefix,
            "haystack": self._text_name,
            "seed": self._bench.seed,
        }

    def ask(self, subject: Subject, journal: Journal, at: tuple[str, ...] = ()) -> None:
        """Ask for what the journal lacks; its keys begin with `at`."""
        for place in self.places:
            task, length, number = place
            if (*at, *place) not in journal.records:
                sample, prompt = self._drawn(subject, place)
                answer = _ask(subject, task, prompt, sample.answers)
                journal.add((*at, *place), answer)
            if number + 1 == self._ruler.samples:
                records = {each: journal.records[*at, *each] for each in self._of(task, length)}
                self._say(" ".join((*at, _line(task, length, _cell(records, task, length)))))

    def read(self, subject: CachedSubject, journal: Journal, at: tuple[str, ...]) -> None:
        """Have a subject compute the prompts whose answers the journal lacks."""
        for place in self.places:
            if (*at, *place) not in journal.records:
                subject.read(self._drawn(subject, place)[1])

    def report(
        self,
        answers: Mapping[Variant | None, Answers],
        parameters: Mapping[str, Parameter],
        counting: str,
    ) -> Report:
        """Report the first variant's scores by task, and how the others differ."""
        ruler, told = self._ruler, {**parameters, **self._asked}
        first, *others = answers
        cells = {variant: self._cells(records) for variant, records in answers.items()}
        results: list[Result] = []
        for variant, records in answers.items():
            own = {} if variant is None else variant.told
            results += _results(cells[variant], ruler, {**told, **own}, [*records.values()])
            if variant != first:
                found = difference(answers[first], records)
                results += difference_results(found, {**told, **own, "base": str(first)})
        subtitle = f"{told['model']}, {self._text_name} text; tokens: {counting}"
        if notes := _notes([each for records in answers.values() for each in records.values()]):
            subtitle += f"; {notes}"
        if first is not None:
            subtitle += f"; {first} KV"
        tables = [_table(cells[first], ruler, subtitle)]
        if others:
            named = {each: records for each, records in answers.items() if each is not None}
            tables.append(difference_table(named, "prompts answered in full"))
        return Report(
            results=tuple(results),
            tables=tuple(tables),
            draw=partial(_draw, cells[first], ruler, subtitle),
        )

    def _of(self, task: str, length: int) -> Iterator[tuple[str, int, int]]:
        return (each for each in self.places if each[:2] == (task, length))

    def _cells(self, records: Answers) -> Cells:
        return {
            (task, length): _cell(records, task, length)
            for task, length in dict.fromkeys(place[:2] for place in self.places)
        }

    def _drawn(self, subject: Subject, place: tuple[str, int, int]) -> tuple[Draft, str]:
        """Draw a sample, and write its prompt."""
        task, length, number = place
        rng = random.Random(f"ruler {FORM} {self._bench.seed} {task} {number}")
        sample = draft(task, rng, tokens=length, sentences=self._sentences, passages=self._passages)
        return sample, _prompt(subject, task, sample, length, self._ruler.answer_prefix)


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
    score = recall(said.text, answers, any_answer=TASKS[task].any_answer)
    record: dict[str, Any] = {
        "score": score,
        "wanted": answers,
        "given": said.text,
        "finish_reason": said.finish_reason,
        "counted_tokens": subject.count(prompt),
        "prompt_tokens": said.prompt_tokens,
        "cached_tokens": said.cached_tokens,
        "seconds": round(said.seconds, 4),
    }
    if said.likeliest:
        record |= {"right": score == 1, "likeliest": told_logprobs(said.likeliest)}
    return record


def _cell(records: Answers, task: str, length: int) -> Cell:
    return Cell(
        tuple(
            float(each["score"]) for place, each in records.items() if place[:2] == (task, length)
        )
    )


def _notes(records: Sequence[Mapping[str, Any]]) -> str:
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
    records: Sequence[Mapping[str, Any]],
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

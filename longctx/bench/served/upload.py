"""A large document through the server: uploaded, asked, and asked again after a restart.

The text is a haystack of `niah`, so each question has a known answer. A process of its own serves,
and is asked over HTTP as any client asks; its store is new, and after the restart its files are
read from the disk itself. Stages of the ingestion, one after another:

- upload: until the file is stored.
- tokenize: until its tokens are known.
- prefill: until the last of them is computed. What steps spend it on is told by the engine.
- store: until all of it is durable, and the file is ready.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from rich.table import Table

from longctx.bench.config import BenchConfig, UploadConfig
from longctx.bench.haystack import Haystack, haystacks
from longctx.bench.picture import Series, draw_bars
from longctx.bench.report import Parameter, Report, Result
from longctx.bench.restart import drop_from_memory
from longctx.bench.served.answer import Answer
from longctx.bench.served.server import RunningServer, serving
from longctx.config import EngineConfig
from longctx.embedded import model_path
from longctx.engine_stats import STEP_PARTS
from longctx.errors import LongctxError
from longctx.needles.scores import matches
from longctx.text.tokenizer import Tokenizer
from offload.units import GIB

DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)
ANSWER_TOKENS = 64
POLL_SECONDS = 0.05
SAY_SECONDS = 10.0
PARTS_METRIC = "longctx_step_parts_seconds_total"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingested:
    """What reading the document took: seconds by stage, and of the prefill by part of its steps."""

    tokens: int
    stages: Mapping[str, float]
    parts: Mapping[str, float]
    write_seconds: float  # by the disk's threads, beside the steps
    busy_seconds: float  # of processors, for all of the server's processes together
    peak_bytes: int

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """All questions of one server, in their order."""

    answers: Sequence[Answer]
    found: int
    parts: Mapping[str, float]  # seconds of steps, of all questions together

    @property
    def first(self) -> float:
        """Seconds to the first token of the very first question."""
        return self.answers[0].first_token_seconds

    @property
    def others(self) -> Sequence[float]:
        """The same of all that followed, sorted."""
        return sorted(answer.first_token_seconds for answer in self.answers[1:])


def run(
    engine: EngineConfig,
    bench: BenchConfig,
    upload: UploadConfig,
    *,
    say: Callable[[str], None],
) -> Report:
    """Measure one document over two servers. Raises LongctxError."""
    hay = _haystack(engine.model.model or model_path(), upload, bench.seed)
    say(f"{len(hay.text):,} characters, {len(hay.planted)} questions")
    # Beside the user's folder if one is named: another disk is another measurement
    with TemporaryDirectory(dir=engine.cache.kv_dir) as scratch:
        folder = Path(scratch)
        config = replace(engine, cache=replace(engine.cache, kv_dir=None))
        with serving(config, folder) as server:
            model = server.model
            file_id, ingested = _ingest(server, hay.text, say)
            say(f"{ingested.tokens:,} tokens in {ingested.seconds:.1f} s")
            warm = _ask_all(server, file_id, hay)
            say(f"warm: {warm.found} of {len(warm.answers)} found")
        drop_from_memory(sorted(folder.rglob("*.kv")))
        began = time.perf_counter()
        with serving(config, folder) as server:
            start_seconds = time.perf_counter() - began
            restored = _ask_all(server, file_id, hay)
            say(f"restored: {restored.found} of {len(restored.answers)} found")
    parameters: dict[str, Parameter] = {"model": model, "document_tokens": ingested.tokens}
    asked = {"warm": warm, "restored": restored}
    changed = sum(
        before.text != after.text
        for before, after in zip(warm.answers, restored.answers, strict=True)
    )
    return Report(
        results=(
            *_ingestion_results(ingested, parameters),
            *_question_results(asked, parameters),
            _result("start after the restart", start_seconds, "s", parameters),
            _result("answers that the restart changed", changed, "answers", parameters),
        ),
        tables=(_ingestion_table(ingested, model), _question_table(asked)),
        draw=partial(_draw, asked, f"{model}, {ingested.tokens:,} tokens"),
    )


def _haystack(model: Path, upload: UploadConfig, seed: int) -> Haystack:
    tokenizer = Tokenizer(model)
    hays = haystacks(
        upload.upload_tokens,
        DEPTHS,
        questions=upload.upload_questions // len(DEPTHS),
        kind="any",
        distractor_count=0,
        seed=seed,
        tokenizer=tokenizer,
    )
    return next(hays)


def _ingest(server: RunningServer, text: str, say: Callable[[str], None]) -> tuple[str, Ingested]:
    """Upload the text and follow the file until it is ready."""
    before = server.metric(PARTS_METRIC, "part")
    busy, began = server.busy_seconds(), time.perf_counter()
    file_id = server.upload("document.txt", text)
    marks = {"upload": time.perf_counter()}
    said = marks["upload"]
    while "store" not in marks:
        file = server.file(file_id)
        now, told = time.perf_counter(), file["longctx"]
        if file["status"] == "error":
            raise LongctxError(f"the document was refused: {told['error']}")
        if told["tokens"] is not None:
            marks.setdefault("tokenize", now)
            if told["prefilled_tokens"] >= told["tokens"]:
                marks.setdefault("prefill", now)
        if told["state"] == "ready":
            marks["store"] = now
        if now - said > SAY_SECONDS:
            said = now
            say(f"{told['prefilled_tokens']:,} of {told['tokens'] or 'unknown'} tokens computed")
        time.sleep(POLL_SECONDS)
    after = server.metric(PARTS_METRIC, "part")
    written = server.metric("longctx_kv_write_seconds_total", "tier")
    ends = [began, *marks.values()]
    return file_id, Ingested(
        tokens=told["tokens"],
        stages={name: end - ends[number] for number, (name, end) in enumerate(marks.items())},
        parts={part: after[part] - before[part] for part in STEP_PARTS},
        write_seconds=written["disk"],
        busy_seconds=server.busy_seconds() - busy,
        peak_bytes=server.peak_bytes(),
    )


def _ask_all(server: RunningServer, file_id: str, hay: Haystack) -> Asked:
    before = server.metric(PARTS_METRIC, "part")
    answers = [
        server.ask(file_id, planted.needle.question, max_tokens=ANSWER_TOKENS)
        for planted in hay.planted
    ]
    after = server.metric(PARTS_METRIC, "part")
    return Asked(
        answers=answers,
        found=sum(
            matches(answer.text, planted.needle.answer, "exact")
            for answer, planted in zip(answers, hay.planted, strict=True)
        ),
        parts={part: after[part] - before[part] for part in STEP_PARTS},
    )


def _result(
    metric: str, value: float, unit: str, parameters: Mapping[str, Parameter], **more: Parameter
) -> Result:
    return Result(metric=metric, value=value, unit=unit, parameters={**parameters, **more})


def _ingestion_results(ingested: Ingested, parameters: Mapping[str, Parameter]) -> Iterator[Result]:
    yield _result("ingested", ingested.seconds, "s", parameters)
    yield _result("ingestion", ingested.tokens / ingested.seconds, "tokens/s", parameters)
    for stage, seconds in ingested.stages.items():
        yield _result("stage", seconds, "s", parameters, stage=stage)
    for part, seconds in ingested.parts.items():
        yield _result("part of the prefill's steps", seconds, "s", parameters, part=part)
    yield _result("written beside it", ingested.write_seconds, "s", parameters)
    yield _result("processors busy", ingested.busy_seconds, "s", parameters)
    yield _result("most memory", ingested.peak_bytes / GIB, "GiB", parameters)


def _question_results(
    asked: Mapping[str, Asked], parameters: Mapping[str, Parameter]
) -> Iterator[Result]:
    for cache, each in asked.items():
        own: dict[str, Parameter] = {
            **parameters,
            "cache": cache,
            "questions": len(each.answers),
        }
        yield _result("found", each.found, "answers", own)
        yield _result("first question, first token", each.first, "s", own)
        yield _result("first token, median", median(each.others), "s", own)
        yield _result("first token, slowest", each.others[-1], "s", own)
        for part, seconds in each.parts.items():
            yield _result("part of the questions' steps", seconds, "s", own, part=part)


def _ingestion_table(ingested: Ingested, model: str) -> Table:
    table = Table(
        title=f"{ingested.tokens:,} tokens in {ingested.seconds:.1f} s",
        caption=f"{model}; most memory {ingested.peak_bytes / GIB:.2f} GiB; processors were busy "
        f"for {ingested.busy_seconds:.1f} s; files were written in {ingested.write_seconds:.1f} s",
    )
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for stage, seconds in ingested.stages.items():
        table.add_row(stage, f"{seconds:.2f}")
        if stage == "prefill":
            outside = seconds - sum(ingested.parts.values())
            for part, spent in (*ingested.parts.items(), ("between steps", outside)):
                table.add_row(f"  {part}", f"{spent:.2f}")
    return table


def _question_table(asked: Mapping[str, Asked]) -> Table:
    table = Table(title="First token of a question", caption="the others: all but the first")
    columns = ("document", "found", "the first", "the others, median", "slowest")
    for name in (*columns, "steps of all", "attention"):
        table.add_column(name, justify="right")
    for cache, each in asked.items():
        table.add_row(
            cache,
            f"{each.found} of {len(each.answers)}",
            f"{each.first:.3f} s",
            f"{median(each.others):.3f} s",
            f"{each.others[-1]:.3f} s",
            f"{sum(each.parts.values()):.2f} s",
            f"{each.parts['attention']:.2f} s",
        )
    return table


def _draw(asked: Mapping[str, Asked], subtitle: str, path: Path) -> None:
    draw_bars(
        path,
        title="A question on a large document: seconds to its first token",
        subtitle=subtitle,
        groups=("the first", "the others, median", "slowest"),
        series=[
            Series(label=cache, values=[each.first, median(each.others), each.others[-1]])
            for cache, each in asked.items()
        ],
        unit="s",
    )

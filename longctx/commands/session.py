"""Documents that are read and asked about in this terminal: what `ask` and `chat` share.

The engine runs in a process of its own, as it does under the server, and so does what reads files.
Answers go to standard output, progress and figures to standard error.
"""

import asyncio
import os
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from api.files.tokenizer_process import TokenizerProcess
from api.files.upload import Upload
from api.http.errors import ApiError
from longctx.config import EngineConfig
from longctx.errors import InvalidRequest, LongctxError
from longctx.process.client import EngineClient
from longctx.request import (
    FinishReason,
    Request,
    RequestClass,
    RequestOutput,
    SamplingParams,
    Segment,
    Usage,
)
from longctx.text.chat_template import ChatPrompts, FilePart, Message
from longctx.text.tokenizer import Tokenizer

STANDARD_INPUT = Path("-")
MAX_FILE_BYTES = 1 << 30
READ_BYTES = 1 << 20
ANSWER_TOKENS = 1024  # at most; less where the context leaves less


@dataclass(frozen=True, slots=True)
class Cost:
    """What an answer took: seconds to its first token and in all, and its token counts."""

    first_token_seconds: float
    seconds: float
    usage: Usage

    def __str__(self) -> str:
        usage = self.usage
        return (
            f"{usage.cached_tokens:,} of {usage.prompt_tokens:,} prompt tokens were cached; "
            f"first token after {self.first_token_seconds:.2f} s, {usage.completion_tokens} tokens "
            f"in {self.seconds:.2f} s"
        )


@asynccontextmanager
async def open_session(
    config: EngineConfig, tokenizer: Tokenizer, tokenizer_process: TokenizerProcess
) -> AsyncGenerator["Session", None]:
    """Make an engine and a folder for texts; end both, and the tokenizer's process, afterwards."""
    engine = EngineClient(config)
    try:
        with TemporaryDirectory(prefix="longctx-") as folder:
            yield Session(engine, ChatPrompts(tokenizer), tokenizer_process, Path(folder))
    finally:
        await engine.drain(0)
        await tokenizer_process.close()


class Session:
    """Reads documents with `read`, once; then `write_answer` to any conversation about them."""

    def __init__(
        self,
        engine: EngineClient,
        prompts: ChatPrompts,
        tokenizer_process: TokenizerProcess,
        folder: Path,
    ) -> None:
        self.engine = engine
        self.prompts = prompts
        self.tokenizer_process = tokenizer_process
        self.folder = folder
        self.documents: tuple[FilePart, ...] = ()
        self.began = time.monotonic()
        self._tokens: dict[str, int] = {}  # by document
        self._requests = 0

    async def read(self, files: Sequence[Path]) -> None:
        """Load the model and compute the documents, one after the other in one prompt.

        Progress is shown for each step. `-` is standard input. Raises LongctxError.
        """
        if list(files).count(STANDARD_INPUT) > 1:
            raise LongctxError("standard input can be read once; name it once")
        self.documents = tuple(
            FilePart(f"document-{number}", _title(file)) for number, file in enumerate(files)
        )
        # Before the model is loaded: a wrong name is told at once
        sizes = [
            await asyncio.to_thread(_copy_text, file, self.folder / part.document_id)
            for file, part in zip(files, self.documents, strict=True)
        ]
        segments = self._opening()
        with _progress() as progress:
            await asyncio.gather(
                self._tokenize(files, sizes, segments, progress), self._load(progress)
            )
            if self.documents:
                await self._compute(segments, progress)

    async def write_answer(self, messages: Sequence[Message], said: list[str]) -> Cost:
        """Stream the answer to standard output, and into `said` as it comes. Raises LongctxError.

        When it is cancelled, the engine stops as well.
        """
        segments = self.prompts.render(messages)
        left = self.engine.info.limits.answer_tokens(self._count(segments))
        sampling = SamplingParams(max_tokens=max(1, min(left, ANSWER_TOKENS)), temperature=0.0)
        asked = time.monotonic()
        first_token: float | None = None
        usage: Usage | None = None
        async with aclosing(self._run(segments, sampling)) as outputs:
            async for output in outputs:
                if output.token_ids and first_token is None:
                    first_token = time.monotonic() - asked
                said.append(output.text)
                print(output.text, end="", flush=True)
                usage = output.usage or usage
        print(flush=True)
        assert usage is not None and first_token is not None
        return Cost(first_token, time.monotonic() - asked, usage)

    def _opening(self) -> tuple[Segment, ...]:
        """Make the prompt up to the end of the last document."""
        if not self.documents:
            return ()
        segments = self.prompts.render([Message("user", (*self.documents, "?"))])
        return segments[: 1 + max(i for i, each in enumerate(segments) if each.document_id)]

    async def _tokenize(
        self,
        files: Sequence[Path],
        sizes: Sequence[int],
        segments: Sequence[Segment],
        progress: Progress,
    ) -> None:
        first = next((segment.document_id for segment in segments), None)
        for file, size, part in zip(files, sizes, self.documents, strict=True):
            text = self.folder / part.document_id
            task = progress.add_task(f"reading {part.title}, bytes", total=size)

            def told(read: int, task: TaskID = task) -> None:
                progress.update(task, completed=read)

            try:
                self._tokens[part.document_id] = await self.tokenizer_process.tokenize(
                    text,
                    text.with_suffix(".tokens"),
                    filename=file.name,
                    continues=part.document_id != first,
                    on_progress=told,
                )
            except InvalidRequest as error:
                raise LongctxError(f"{file}: {error}") from error
            progress.update(task, completed=size)

    async def _load(self, progress: Progress) -> None:
        loading = progress.add_task("loading the model", total=None)
        self.engine.on_loading = lambda step: progress.update(loading, description=step)
        await self.engine.start()
        progress.update(loading, total=1, completed=1)

    async def _compute(self, segments: tuple[Segment, ...], progress: Progress) -> None:
        computing = progress.add_task("computing, tokens", total=self._count(segments))
        for part in self.documents:
            tokens = (self.folder / part.document_id).with_suffix(".tokens")
            await self.engine.open_document(part.document_id, tokens)
        outputs = self._run(segments, SamplingParams(max_tokens=0), RequestClass.INGEST)
        async with aclosing(outputs):
            async for output in outputs:
                if output.progress is not None:
                    progress.update(computing, completed=output.progress.processed)
        progress.update(computing, completed=self._count(segments))

    async def _run(
        self,
        segments: tuple[Segment, ...],
        sampling: SamplingParams,
        request_class: RequestClass = RequestClass.INTERACTIVE,
    ) -> AsyncGenerator[RequestOutput, None]:
        self._requests += 1
        request = Request(
            request_id=f"request-{self._requests}",
            segments=segments,
            sampling=sampling,
            request_class=request_class,
        )
        async with aclosing(self.engine.generate(request)) as outputs:
            async for output in outputs:
                if output.finish_reason is FinishReason.ERROR:
                    raise LongctxError(output.error or "the engine failed")
                yield output

    def _count(self, segments: Sequence[Segment]) -> int:
        return sum(
            len(segment.token_ids)
            if segment.document_id is None
            else self._tokens[segment.document_id]
            for segment in segments
        )


def _title(file: Path) -> str:
    """The file's name as the model reads it; what is not UTF-8 in it becomes a mark."""
    if file == STANDARD_INPUT:
        return "standard input"
    return os.fsencode(file.name).decode("utf-8", "replace")


def _copy_text(source: Path, target: Path) -> int:
    """Copy a document, checked as an upload is; returns its size in bytes. Raises LongctxError."""
    name = _title(source) if source == STANDARD_INPUT else source
    try:
        if source == STANDARD_INPUT:
            return _copy(sys.stdin.buffer, target)
        with source.open("rb") as file:
            return _copy(file, target)
    except OSError as error:
        raise LongctxError(f"cannot read {name}: {error.strerror}") from error
    except ApiError as error:
        raise LongctxError(f"{name}: {error.message}") from error


def _copy(file: BinaryIO, target: Path) -> int:
    with Upload(target.with_suffix(".partial"), limit_bytes=MAX_FILE_BYTES) as upload:
        while data := file.read(READ_BYTES):
            upload.write(data)
        upload.finish()
        upload.path.rename(target)
        return upload.size_bytes


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )

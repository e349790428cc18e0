"""`longctx ask FILE QUESTION`: what the server does with a document and a question, once, here."""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from api.files.tokenizer_process import TokenizerProcess
from api.files.upload import Upload
from api.http.errors import ApiError
from longctx.commands.arguments import read_engine_config
from longctx.config import EngineConfig
from longctx.errors import LongctxError
from longctx.options import is_unicode
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

DOCUMENT_ID = "document"
MAX_FILE_BYTES = 1 << 30
READ_BYTES = 1 << 20
ANSWER_TOKENS = 1024  # at most; less where the context leaves less


def run(arguments: argparse.Namespace) -> None:
    """Stream the answer to stdout; progress and figures go to stderr. Raises LongctxError."""
    config, folder = read_engine_config(arguments)
    if not is_unicode(arguments.question):
        raise LongctxError("the question is not UTF-8 text; write it in UTF-8")
    tokenizer = Tokenizer(folder)
    process = TokenizerProcess(tokenizer)
    try:
        asyncio.run(_ask(config, tokenizer, process, arguments.file, arguments.question))
    except asyncio.CancelledError:  # Ctrl-C, where a task that was cancelled raises it
        raise KeyboardInterrupt from None


async def _ask(
    config: EngineConfig,
    tokenizer: Tokenizer,
    tokenizer_process: TokenizerProcess,
    file: Path,
    question: str,
) -> None:
    engine = EngineClient(config)
    try:
        with TemporaryDirectory(prefix="longctx-") as folder:
            session = _Session(engine, ChatPrompts(tokenizer), tokenizer_process, Path(folder))
            await session.read(file)
            await session.answer(file, question)
    finally:
        await engine.drain(0)
        await tokenizer_process.close()


class _Session:
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
        self.document_tokens = 0
        self.began = time.monotonic()

    async def read(self, file: Path) -> None:
        """Load the model and compute the document, with a progress bar for each step."""
        text, tokens = self.folder / "text", self.folder / "tokens"
        prefix = self.prompts.document_prefix(None, title=_title(file))
        size = await asyncio.to_thread(_copy_text, file, text)
        with _progress() as progress:
            reading = progress.add_task("reading, bytes", total=size)
            self.document_tokens, _ = await asyncio.gather(
                self.tokenizer_process.tokenize(
                    text,
                    tokens,
                    filename=file.name,
                    continues=bool(prefix),
                    on_progress=lambda read: progress.update(reading, completed=read),
                ),
                self._load(progress),
            )
            computing = progress.add_task("computing, tokens", total=self.document_tokens)
            await self.engine.open_document(DOCUMENT_ID, tokens)
            before = (Segment(token_ids=prefix),) if prefix else ()
            request = Request(
                request_id="ingest",
                segments=(*before, Segment(document_id=DOCUMENT_ID)),
                sampling=SamplingParams(max_tokens=0),
                request_class=RequestClass.INGEST,
            )
            async for output in self._run(request):
                if output.progress is not None:
                    done = max(0, output.progress.processed - len(prefix))
                    progress.update(computing, completed=done)
            progress.update(computing, completed=self.document_tokens)

    async def _load(self, progress: Progress) -> None:
        loading = progress.add_task("loading the model", total=None)
        self.engine.on_loading = lambda step: progress.update(loading, description=step)
        await self.engine.start()
        progress.update(loading, total=1, completed=1)

    async def answer(self, file: Path, question: str) -> None:
        message = Message("user", (FilePart(DOCUMENT_ID, _title(file)), question))
        segments = self.prompts.render([message])
        prompt_tokens = self.document_tokens + sum(len(part.token_ids) for part in segments)
        left = self.engine.info.limits.answer_tokens(prompt_tokens)
        request = Request(
            request_id="question",
            segments=segments,
            sampling=SamplingParams(max_tokens=max(1, min(left, ANSWER_TOKENS)), temperature=0.0),
        )
        asked = time.monotonic()
        first_token: float | None = None
        usage: Usage | None = None
        async for output in self._run(request):
            if output.token_ids and first_token is None:
                first_token = time.monotonic() - asked
            print(output.text, end="", flush=True)
            usage = output.usage or usage
        print(flush=True)
        assert usage is not None and first_token is not None
        print(
            f"{usage.cached_tokens:,} of {usage.prompt_tokens:,} prompt tokens were cached; "
            f"first token after {first_token:.2f} s, {usage.completion_tokens} tokens in "
            f"{time.monotonic() - asked:.2f} s; {time.monotonic() - self.began:.1f} s in all",
            file=sys.stderr,
        )

    async def _run(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        async with aclosing(self.engine.generate(request)) as outputs:
            async for output in outputs:
                if output.finish_reason is FinishReason.ERROR:
                    raise LongctxError(output.error or "the engine failed")
                yield output


def _title(file: Path) -> str:
    """The file's name as the model reads it; what is not UTF-8 in it becomes a mark."""
    return os.fsencode(file.name).decode("utf-8", "replace")


def _copy_text(source: Path, target: Path) -> int:
    """Copy text, checked as an upload is; returns its size in bytes. Raises LongctxError."""
    try:
        with (
            source.open("rb") as file,
            Upload(target.with_suffix(".partial"), limit_bytes=MAX_FILE_BYTES) as upload,
        ):
            while data := file.read(READ_BYTES):
                upload.write(data)
            upload.finish()
            upload.path.rename(target)
            return upload.size_bytes
    except OSError as error:
        raise LongctxError(f"cannot read {source}: {error.strerror}") from error
    except ApiError as error:
        raise LongctxError(f"{source}: {error.message}") from error


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )

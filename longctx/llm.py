"""Runs longctx as a library: the engine in this process, with calls that block.

    llm = LLM("path/to/model")
    document = llm.document("report.txt")      # read once
    print(document.ask("What does it say about X?").text)

`AsyncLLM` is the same for asyncio. For many users at once, or to outlive a restart, use the server.
"""

import asyncio
import hashlib
import itertools
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from longctx.config import EngineConfig, ModelConfig
from longctx.documents.read_text import Unreadable
from longctx.documents.reader import read_document
from longctx.errors import InvalidRequest, LongctxError
from longctx.model.named import find_model
from longctx.open_engine import open_engine
from longctx.request import (
    Erasure,
    FinishReason,
    Piece,
    Request,
    RequestClass,
    RequestOutput,
    SamplingParams,
    Segment,
    TokenLogprob,
    Usage,
)
from longctx.text.chat_template import ChatPrompts, FilePart, Message

Result = TypeVar("Result")

KEPT = SamplingParams(max_tokens=0)  # a prompt that is computed to be kept, for no answer


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said: the first choice of one request."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()  # of each token, where `SamplingParams` ask for them
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


class LLM:
    """A model that is loaded and ready, in this process.

        with LLM("path/to/model") as llm:
            (answer,) = llm.generate("Once upon a time", SamplingParams(max_tokens=50))
            answer = llm.chat([Message("user", ("What is a page table?",))])
            report = llm.document("report.txt")          # computed once, then held
            print(report.ask("What does it say about X?").text)

    Each method returns when its answers are complete. One thread at a time may call them. `close`,
    or leaving the `with` block, comes last.
    """

    def __init__(self, model: str | Path | None = None, config: EngineConfig | None = None) -> None:
        """Load `model`: a Hugging Face folder, a GGUF file or a name; `needle` if absent.

        Raises ModelRefused where the folder cannot be served exactly.
        """
        config = config or EngineConfig(model=ModelConfig(model=Path(model) if model else None))
        folder = find_model(Path(model) if model else config.model.model)
        self.engine = open_engine(config, folder)
        self._prompts = ChatPrompts(self.engine.tokenizer)
        self._ids = itertools.count()
        self._taken: set[str] = set()  # ids of what is open

    def close(self, *, flush_seconds: float = 60.0) -> None:
        """End the engine; wait up to `flush_seconds` for what is on its way to the disk."""
        self.engine.close(flush_seconds=flush_seconds)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def generate(
        self, prompts: str | Sequence[str], sampling: SamplingParams | None = None
    ) -> list[Answer]:
        """Continue plain texts, which are computed together; return one answer for each.

        Raises InvalidRequest or ContextTooLong before anything is computed, and LongctxError where
        the engine fails. Of `n` > 1 choices the first is returned.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        encode = self.engine.tokenizer.encode_completion
        segments = [(Segment(token_ids=tuple(encode(text))),) for text in texts]
        return self._answers(segments, sampling or SamplingParams())

    def chat(self, messages: Sequence[Message], sampling: SamplingParams | None = None) -> Answer:
        """Answer a conversation, which is rendered by the model's chat template."""
        segments = self._prompts.render(messages)
        (answer,) = self._answers([segments], sampling or SamplingParams())
        return answer

    def answer(self, segments: Sequence[Segment], sampling: SamplingParams | None = None) -> Answer:
        """Answer a prompt that is given as tokens, documents and pieces of modules."""
        (answer,) = self._answers([tuple(segments)], sampling or SamplingParams())
        return answer

    def open_module(self, pieces: Sequence[Piece], *, module_id: str | None = None) -> str:
        """Compute the attention state of a module by itself; return its id for `Segment.module_id`.

        module_id = llm.open_module([Piece(token_ids=tokens, position=0)])
        llm.answer([Segment(module_id=module_id, link_tokens=0), Segment(token_ids=question)])
        """
        module_id = module_id or self._new_id("module", repr(tuple(pieces)))
        self.engine.open_module(module_id, pieces)
        segments = (Segment(encodes=module_id),)
        self._answers([segments], KEPT, request_class=RequestClass.INGEST)
        return module_id

    def close_document(self, document_id: str) -> Erasure:
        """Forget a document and erase what stems from it, as `Document.close`."""
        return self._erased(document_id, self.engine.close_document(document_id))

    def close_module(self, module_id: str) -> Erasure:
        """Forget a module and erase what stems from it; return what that was."""
        return self._erased(module_id, self.engine.close_module(module_id))

    def document(self, path: str | Path, *, system: str | None = None) -> "Document":
        """Read a document and compute its attention state, after `system` if given.

        It may be text in any common encoding, Markdown, CSV, HTML, PDF, Word (.docx), EPUB, or a
        tree of files (.zip, .tar.gz). Raises InvalidRequest where no text can be had from it.
        """
        path = Path(path)
        return self.document_from_text(_read(path), title=path.name, system=system)

    def document_from_text(
        self, text: str, *, title: str = "document", system: str | None = None
    ) -> "Document":
        """Compute the attention state of a text, as `document` does for a file."""
        token_ids = self._encoded(text)
        document_id = self._open(text, token_ids, title, system)
        (ingested,) = self._answers(
            [self._opening(document_id, title, system)], KEPT, request_class=RequestClass.INGEST
        )
        return Document(self, FilePart(document_id, title), len(token_ids), system, ingested.usage)

    def _encoded(self, text: str) -> NDArray[np.int32]:
        return np.array(self.engine.tokenizer.encode(text), dtype=np.int32)

    def _open(self, text: str, token_ids: NDArray[np.int32], title: str, system: str | None) -> str:
        """Open a document in the engine; return its id. Nothing of it is computed yet."""
        document_id = self._new_id("document", repr((text, title, system)))
        self.engine.open_document(document_id, token_ids)
        return document_id

    def _opening(self, document_id: str, title: str, system: str | None) -> tuple[Segment, ...]:
        """Make the prompt up to the end of the document."""
        prefix = self._prompts.document_prefix(system, title=title)
        return (Segment(token_ids=prefix), Segment(document_id=document_id))

    def _new_id(self, kind: str, content: str) -> str:
        """Make an id that tells contents apart, also those of earlier processes on disk.

        What is open twice has two ids.
        """
        digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=12)
        name = f"{kind}-{digest.hexdigest()}"
        while name in self._taken:
            name = f"{kind}-{digest.hexdigest()}-{next(self._ids)}"
        self._taken.add(name)
        return name

    def _erased(self, owner: str, erasure: Erasure) -> Erasure:
        """See an erasure to its end: the tiers may still be writing what is to go."""
        self._taken.discard(owner)
        while erasure.waits and self.engine.has_transfers:
            self.engine.step()
            erasure = self.engine.take_erased().get(owner, erasure)
        return erasure

    def _answers(
        self,
        prompts: Sequence[tuple[Segment, ...]],
        sampling: SamplingParams,
        *,
        request_class: RequestClass = RequestClass.INTERACTIVE,
    ) -> list[Answer]:
        requests = [self._request(segments, sampling, request_class) for segments in prompts]
        collected: dict[str, list[RequestOutput]] = {}
        for output in self._run(requests):
            if output.progress is None and (output.index == 0 or output.finished):
                collected.setdefault(output.request_id, []).append(output)
        return [_answer(collected[request.request_id]) for request in requests]

    def _request(
        self, segments: tuple[Segment, ...], sampling: SamplingParams, request_class: RequestClass
    ) -> Request:
        return Request(
            request_id=f"request-{next(self._ids)}",
            segments=segments,
            sampling=sampling,
            request_class=request_class,
        )

    def _run(self, requests: Sequence[Request]) -> Iterator[RequestOutput]:
        submitted: list[str] = []
        try:
            for request in requests:
                self.engine.submit(request)
                submitted.append(request.request_id)
            while self.engine.has_work:
                yield from self.engine.step()
        finally:  # an error or Ctrl-C leaves nothing running
            for request_id in submitted:
                self.engine.abort(request_id)
            while self.engine.has_work:
                self.engine.step()


@dataclass(frozen=True, slots=True)
class Document:
    """A document whose attention state an engine holds; questions on it compute only themselves."""

    llm: LLM
    part: FilePart
    tokens: int
    system: str | None
    usage: Usage  # of reading it

    def ask(self, question: str, sampling: SamplingParams | None = None) -> Answer:
        """Answer a question about the document; only the question is computed."""
        messages = _about(self.part, self.system, question)
        return self.llm.chat(messages, sampling or SamplingParams(temperature=0.0))

    def close(self) -> Erasure:
        """Forget the document and erase what stems from it; return what that was.

        `ask` raises DocumentMissing afterwards.
        """
        return self.llm.close_document(self.part.document_id)


class AsyncLLM:
    """The same for asyncio: many questions at once, which are computed together, and streams.

        async with AsyncLLM("path/to/model") as llm:
            report = await llm.document("report.txt")
            answers = await asyncio.gather(*(report.ask(question) for question in questions))
            async for text in report.stream("What does it say about X?"):
                print(text, end="")

    The engine runs in a thread of its own. Who is cancelled, or leaves a stream, ends the request.
    """

    def __init__(self, model: str | Path | None = None, config: EngineConfig | None = None) -> None:
        """Load a model as `LLM` does, which blocks. Raises ModelRefused."""
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, Callable[[RequestOutput | LongctxError], None]] = {}
        self._closed = False
        loaded: Future[LLM] = Future()
        self._thread = threading.Thread(
            target=self._serve, args=(model, config, loaded), daemon=True
        )
        self._thread.start()
        self._llm = loaded.result()

    async def close(self) -> None:
        """End the engine; what is still asked ends with an error."""
        if not self._closed:
            self._closed = True
            self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def generate(self, prompt: str, sampling: SamplingParams | None = None) -> Answer:
        """Continue a plain text."""
        token_ids = await asyncio.to_thread(self._llm.engine.tokenizer.encode_completion, prompt)
        segments = (Segment(token_ids=tuple(token_ids)),)
        return _answer([output async for output in self._outputs(segments, sampling)])

    async def chat(
        self, messages: Sequence[Message], sampling: SamplingParams | None = None
    ) -> Answer:
        """Answer a conversation, which is rendered by the model's chat template."""
        segments = await asyncio.to_thread(self._llm._prompts.render, messages)
        return _answer([output async for output in self._outputs(segments, sampling)])

    async def stream(
        self, messages: Sequence[Message], sampling: SamplingParams | None = None
    ) -> AsyncGenerator[str, None]:
        """Yield the text of an answer as it comes, in pieces that end with a whole character."""
        segments = await asyncio.to_thread(self._llm._prompts.render, messages)
        async with aclosing(self._outputs(segments, sampling)) as outputs:
            async for output in outputs:
                if output.index == 0:
                    _check(output)
                    if output.text:
                        yield output.text

    async def document(self, path: str | Path, *, system: str | None = None) -> "AsyncDocument":
        """Read a document of any format that `LLM.document` reads, and compute it."""
        path = Path(path)
        text = await asyncio.to_thread(_read, path)
        return await self.document_from_text(text, title=path.name, system=system)

    async def document_from_text(
        self, text: str, *, title: str = "document", system: str | None = None
    ) -> "AsyncDocument":
        """Compute the attention state of a text; other questions are answered meanwhile."""
        llm = self._llm
        token_ids = await asyncio.to_thread(llm._encoded, text)
        document_id = await self._call(lambda: llm._open(text, token_ids, title, system))
        segments = llm._opening(document_id, title, system)
        outputs = self._outputs(segments, KEPT, request_class=RequestClass.INGEST)
        ingested = _answer([output async for output in outputs])
        part = FilePart(document_id, title)
        return AsyncDocument(self, part, len(token_ids), system, ingested.usage)

    async def close_document(self, document_id: str) -> Erasure:
        """Forget a document; return what was erased at once, and what the rest waits for."""
        self._llm._taken.discard(document_id)
        return await self._call(lambda: self._llm.engine.close_document(document_id))

    async def _outputs(
        self,
        segments: tuple[Segment, ...],
        sampling: SamplingParams | None,
        *,
        request_class: RequestClass = RequestClass.INTERACTIVE,
    ) -> AsyncGenerator[RequestOutput, None]:
        llm, loop = self._llm, asyncio.get_running_loop()
        request = llm._request(segments, sampling or SamplingParams(), request_class)
        news: asyncio.Queue[RequestOutput | LongctxError] = asyncio.Queue()

        def hand_out(output: RequestOutput | LongctxError) -> None:
            with suppress(RuntimeError):  # its loop was closed: nobody listens
                loop.call_soon_threadsafe(news.put_nowait, output)

        def submit() -> None:
            llm.engine.submit(request)
            self._streams[request.request_id] = hand_out

        def leave() -> None:
            if self._streams.pop(request.request_id, None) is not None:
                llm.engine.abort(request.request_id)

        try:
            await self._call(submit)
            while True:
                output = await news.get()
                if isinstance(output, LongctxError):
                    raise output
                if output.progress is None:
                    yield output
                if output.finished:
                    return
        finally:
            self._commands.put(leave)

    async def _call(self, work: Callable[[], Result]) -> Result:
        """Return what `work` returns on the engine's thread, between two of its steps."""
        if self._closed:
            raise LongctxError("the engine is closed; make another AsyncLLM")
        done: Future[Result] = Future()

        def run() -> None:
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(work())
                except Exception as error:
                    done.set_exception(error)

        self._commands.put(run)
        return await asyncio.wrap_future(done)

    def _serve(
        self, model: str | Path | None, config: EngineConfig | None, loaded: "Future[LLM]"
    ) -> None:
        """Run the engine: all that is asked of it, then a step, for as long as there is work."""
        try:
            llm = LLM(model, config)
        except BaseException as error:
            loaded.set_exception(error)
            return
        loaded.set_result(llm)
        with llm:
            while self._obey(waits=not (llm.engine.has_work or llm.engine.has_transfers)):
                try:
                    outputs = llm.engine.step()
                except Exception as error:
                    self._end_all(LongctxError(f"the engine failed: {error}"))
                    continue
                for output in outputs:
                    take = self._streams.pop if output.finished else self._streams.get
                    if (hand_out := take(output.request_id, None)) is not None:
                        hand_out(output)
            self._end_all(LongctxError("the engine was closed before the answer was complete"))

    def _obey(self, *, waits: bool) -> bool:
        """Run what was asked meanwhile, or wait for something; return False at the end."""
        while waits or not self._commands.empty():
            command = self._commands.get()
            waits = False
            if command is None:
                return False
            command()
        return True

    def _end_all(self, error: LongctxError) -> None:
        for hand_out in self._streams.values():
            hand_out(error)
        self._streams.clear()


@dataclass(frozen=True, slots=True)
class AsyncDocument:
    """A document that an `AsyncLLM` holds; questions on it compute only themselves."""

    llm: AsyncLLM
    part: FilePart
    tokens: int
    system: str | None
    usage: Usage  # of reading it

    async def ask(self, question: str, sampling: SamplingParams | None = None) -> Answer:
        """Answer a question about the document, as `Document.ask`."""
        messages = _about(self.part, self.system, question)
        return await self.llm.chat(messages, sampling or SamplingParams(temperature=0.0))

    async def stream(
        self, question: str, sampling: SamplingParams | None = None
    ) -> AsyncGenerator[str, None]:
        """Yield the text of the same answer as it comes."""
        messages = _about(self.part, self.system, question)
        texts = self.llm.stream(messages, sampling or SamplingParams(temperature=0.0))
        async with aclosing(texts):
            async for text in texts:
                yield text

    async def close(self) -> Erasure:
        """Forget the document, as `AsyncLLM.close_document`."""
        return await self.llm.close_document(self.part.document_id)


def _about(part: FilePart, system: str | None, question: str) -> tuple[Message, ...]:
    opening = () if system is None else (Message("system", (system,)),)
    return (*opening, Message("user", (part, question)))


def _read(path: Path) -> str:
    """Return the text of a document. Raises InvalidRequest where none can be had from it."""
    try:
        return read_document(path, path.name).text
    except Unreadable as error:
        raise InvalidRequest(f"{path}: {error}") from error


def _check(output: RequestOutput) -> None:
    """Raise the error that ended a choice, if any."""
    if output.finish_reason is FinishReason.ERROR:
        if output.error_param is not None:
            raise InvalidRequest(output.error or "", param=output.error_param)
        raise LongctxError(output.error)


def _answer(outputs: Sequence[RequestOutput]) -> Answer:
    own = [output for output in outputs if output.index == 0]
    reason, usage = own[-1].finish_reason, outputs[-1].usage
    assert reason is not None and usage is not None
    _check(own[-1])
    return Answer(
        text="".join(output.text for output in own),
        token_ids=tuple(token for output in own for token in output.token_ids),
        finish_reason=reason,
        usage=usage,
        logprobs=tuple(told for output in own for told in output.logprobs),
        prompt_logprobs=tuple(told for output in own for told in output.prompt_logprobs),
    )

"""Runs longctx as a library: the engine in this process, with calls that block.

    llm = LLM("path/to/model")
    document = llm.document("report.txt")      # read once
    print(document.ask("What does it say about X?").text)

For many users at once, or for not blocking the caller, use the server.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
        self._answers([segments], SamplingParams(max_tokens=0), request_class=RequestClass.INGEST)
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
        try:
            text = read_document(path, path.name).text
        except Unreadable as error:
            raise InvalidRequest(f"{path}: {error}") from error
        return self.document_from_text(text, title=path.name, system=system)

    def document_from_text(
        self, text: str, *, title: str = "document", system: str | None = None
    ) -> "Document":
        """Compute the attention state of a text, as `document` does for a file."""
        token_ids = np.array(self.engine.tokenizer.encode(text), dtype=np.int32)
        document_id = self._new_id("document", repr((text, title, system)))
        self.engine.open_document(document_id, token_ids)
        prefix = self._prompts.document_prefix(system, title=title)
        segments = (Segment(token_ids=prefix), Segment(document_id=document_id))
        (ingested,) = self._answers(
            [segments], SamplingParams(max_tokens=0), request_class=RequestClass.INGEST
        )
        return Document(self, FilePart(document_id, title), len(token_ids), system, ingested.usage)

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
        requests = [
            Request(
                request_id=f"request-{next(self._ids)}",
                segments=segments,
                sampling=sampling,
                request_class=request_class,
            )
            for segments in prompts
        ]
        collected: dict[str, list[RequestOutput]] = {}
        for output in self._run(requests):
            if output.progress is None and (output.index == 0 or output.finished):
                collected.setdefault(output.request_id, []).append(output)
        return [_answer(collected[request.request_id]) for request in requests]

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
        system = () if self.system is None else (Message("system", (self.system,)),)
        messages = (*system, Message("user", (self.part, question)))
        return self.llm.chat(messages, sampling or SamplingParams(temperature=0.0))

    def close(self) -> Erasure:
        """Forget the document and erase what stems from it; return what that was.

        `ask` raises DocumentMissing afterwards.
        """
        return self.llm.close_document(self.part.document_id)


def _answer(outputs: Sequence[RequestOutput]) -> Answer:
    own = [output for output in outputs if output.index == 0]
    reason, usage = own[-1].finish_reason, outputs[-1].usage
    assert reason is not None and usage is not None
    if reason is FinishReason.ERROR:
        if own[-1].error_param is not None:
            raise InvalidRequest(own[-1].error or "", param=own[-1].error_param)
        raise LongctxError(own[-1].error)
    return Answer(
        text="".join(output.text for output in own),
        token_ids=tuple(token for output in own for token in output.token_ids),
        finish_reason=reason,
        usage=usage,
        logprobs=tuple(told for output in own for told in output.logprobs),
        prompt_logprobs=tuple(told for output in own for told in output.prompt_logprobs),
    )

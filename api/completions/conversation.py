"""Makes the prompt of a chat from messages whose files have been found."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from api.completions.answering import PromptSource
from api.completions.generation import EnginePrompt
from api.completions.preamble import REPORT_SECONDS, Preamble
from api.files.document import Document
from api.files.document_library import DocumentLibrary
from api.http.sse import JSONObject
from longctx.errors import InvalidRequest
from longctx.request import Segment
from longctx.text import chat_template
from longctx.text.chat_template import ChatPrompts, Ending, FilePart, PromptPiece
from longctx.text.tool_forms import Tool
from prompt_cache.level import Level

# A conversation of this length renders and tokenizes in about a millisecond; a longer one goes to
# a thread.
SHORT_CHARACTERS = 4096


class Conversation(PromptSource):
    """Makes the prompt of a chat: of a preamble, messages and files, which may be waited for."""

    def __init__(
        self,
        messages: list[chat_template.Message],
        files: list[Document],
        prompts: ChatPrompts,
        library: DocumentLibrary,
        preamble: Preamble,
        *,
        ending: Ending,
        tools: Sequence[Tool] = (),
        sources: tuple[str, ...] = (),
        check: Callable[[Sequence[Segment], int], None],
        keep: Callable[[Sequence[Segment]], Awaitable[None]],
    ) -> None:
        """`sources` are those of the messages, as `Request.sources`. `check` is called with the
        prompt's segments and tokens before it is answered, and raises for a prompt that may not be;
        `keep` with its segments afterwards.

        Raises ApiError where the messages do not go together with the preamble.
        """
        super().__init__()
        self._messages = preamble.messages(messages)
        self._files = files
        self._prompts = prompts
        self._library = library
        self._preamble = preamble
        self._ending = ending
        self._tools = tools
        self._sources = sources
        self._check = check
        self._keep = keep
        self._segments: tuple[Segment, ...] = ()
        self._reused = [
            {"file_id": part.document_id, "level": Level(part.link_tokens).name}
            for message in messages
            for part in message.content
            if isinstance(part, FilePart) and part.link_tokens is not None
        ]

    @property
    def prompt_cache(self) -> JSONObject:
        told = self._preamble.prompt_cache
        return {**told, "files": self._reused} if self._reused else told

    @property
    def is_ready(self) -> bool:
        return self._preamble.is_ready and all(
            document.tokenized.is_set() for document in self._files
        )

    async def waiting(self) -> AsyncGenerator[JSONObject, None]:
        async for news in self._preamble.waiting():
            yield news
        for document in self._files:
            while not await self._library.wait_tokenized(document, timeout_seconds=REPORT_SECONDS):
                yield {"waiting_for": document.tokenizing_progress()}

    async def prompts(self) -> list[EnginePrompt]:
        """Renders the prompt. Raises ApiError when a file has failed or was deleted."""
        for document in self._files:
            self._library.check(document)
        split = await self._preamble.split(await self._rendered(self._messages, self._ending))
        rest = chat_template.segments_of(split.rest)
        counts = {document.id: document.tokens for document in self._files}
        tokens = sum(
            len(segment.token_ids) if segment.document_id is None else counts[segment.document_id]
            for segment in rest
        )
        self._note_prefixes(split.segments, rest)
        self._segments = (*split.segments, *rest)
        tokens += split.tokens
        self._check(self._segments, tokens)
        return [
            EnginePrompt(
                segments=self._segments,
                tokens=tokens,
                gap_tokens=split.gap_tokens,
                sources=(*self._preamble.sources, *self._sources),
            )
        ]

    async def shared_tokens(self, begin: list[chat_template.Message]) -> int:
        """Counts the tokens at the prompt's beginning that are those of these messages as well.

        Call it once the prompt is made. Where the template cannot write them, there are none.
        """
        try:
            pieces = await self._rendered(begin, Ending.CLOSED)
        except InvalidRequest:
            return 0
        counts = {document.id: document.tokens for document in self._files}
        shared = 0
        for ours, theirs in zip(self._segments, chat_template.segments_of(pieces), strict=False):
            if ours.document_id is not None and ours.document_id == theirs.document_id:
                shared += counts[ours.document_id]
                continue
            pairs = list(zip(ours.token_ids, theirs.token_ids, strict=False))
            same = next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs))
            shared += same
            if same < len(ours.token_ids) or not ours.token_ids:
                break
        return shared

    def first_segments(self, tokens: int) -> tuple[list[Segment], int]:
        """Cuts the prompt after so many tokens, or after the document that they end in; returns
        what is before, and its tokens."""
        counts = {document.id: document.tokens for document in self._files}
        found: list[Segment] = []
        before = 0
        for segment in self._segments:
            if before >= tokens:
                break
            if segment.document_id is not None:
                found.append(segment)
                before += counts[segment.document_id]
            else:
                ids = segment.token_ids[: tokens - before]
                found.append(Segment(token_ids=ids))
                before += len(ids)
        return found, before

    async def on_answered(self) -> None:
        await self._keep(self._segments)

    async def _rendered(
        self, messages: list[chat_template.Message], ending: Ending
    ) -> tuple[PromptPiece, ...]:
        date = self._preamble.date
        if date is None and self._files:
            date = self._files[0].record.date
        characters = sum(
            len(part) for message in messages for part in message.content if isinstance(part, str)
        )
        if characters <= SHORT_CHARACTERS:
            return self._prompts.pieces(messages, date=date, ending=ending, tools=self._tools)
        return await asyncio.to_thread(
            self._prompts.pieces, messages, date=date, ending=ending, tools=self._tools
        )

    def _note_prefixes(self, preamble: Sequence[Segment], segments: Sequence[Segment]) -> None:
        """Notes which files follow other text than they were computed after, and why."""
        by_id = {document.id: document for document in self._files}
        before: tuple[int, ...] = preamble[0].token_ids if preamble else ()
        seen: list[str] = []
        differing = []
        for segment in segments:
            if segment.document_id is None:
                before = before + segment.token_ids if preamble else segment.token_ids
                continue
            document = by_id[segment.document_id]
            reason = None
            if segment.document_id in seen:
                reason = "it stands in the conversation twice"
            elif seen:
                reason = f"it stands after file {seen[-1]}"
            elif len(preamble) > 1 or before != document.prefix:
                reason = _first_difference(document.prefix, before)
            if reason is not None and segment.link_tokens is None:
                document.prefix_difference = reason
                differing.append({"file_id": segment.document_id, "computed_again": reason})
            seen.append(segment.document_id)
        if differing:
            self.notes["document_prefix"] = differing


def _first_difference(ingested: tuple[int, ...], asked: tuple[int, ...]) -> str:
    pairs = zip(ingested, asked, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ingested), len(asked)))
    return (
        f"the prompt before the file differs from the one it was read under, from token {same} on; "
        "upload the file with this system prompt, or put it at the start of the first message"
    )

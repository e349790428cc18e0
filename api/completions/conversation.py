"""Messages whose files have been found, on their way to be a prompt."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from api.completions.generation import Prompt
from api.completions.preamble import NEWS_SECONDS, Opening
from api.completions.reply import Body
from api.files.document_library import Entry, Library
from longctx.request import Segment
from longctx.text import chat_template
from longctx.text.chat_template import ChatPrompts, FilePart, PromptPiece
from prompt_cache.level import Level

# A conversation of this length renders and tokenizes in about a millisecond; a longer one goes to
# a thread.
SHORT_CHARACTERS = 4096


class Conversation:
    def __init__(
        self,
        messages: list[chat_template.Message],
        files: list[Entry],
        prompts: ChatPrompts,
        library: Library,
        opening: Opening,
        *,
        check: Callable[[Sequence[Segment], int], None],
        keep: Callable[[Sequence[Segment]], Awaitable[None]],
    ) -> None:
        """`check`: raises for what may not be answered, a prompt of so many tokens. `keep`: what is
        to be done with it when it has been answered.

        Raises ApiError where the messages do not go together with what they begin with.
        """
        self.notes: Body = {}
        self._messages = opening.messages(messages)
        self._files = files
        self._prompts = prompts
        self._library = library
        self._opening = opening
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
    def prompt_cache(self) -> Body:
        told = self._opening.prompt_cache
        return {**told, "files": self._reused} if self._reused else told

    @property
    def is_ready(self) -> bool:
        return self._opening.is_ready and all(entry.tokenized.is_set() for entry in self._files)

    async def waiting(self) -> AsyncGenerator[Body, None]:
        async for news in self._opening.waiting():
            yield news
        for entry in self._files:
            while not await self._library.wait_tokenized(entry, timeout_seconds=NEWS_SECONDS):
                yield {"waiting_for": entry.reading()}

    async def prompts(self) -> list[Prompt]:
        """Raises ApiError when a file has failed or was deleted."""
        for entry in self._files:
            self._library.check(entry)
        opened = await self._opening.open(await self._rendered())
        rest = chat_template.segments_of(opened.rest)
        counts = {entry.document.id: entry.tokens for entry in self._files}
        tokens = sum(
            len(segment.token_ids) if segment.document_id is None else counts[segment.document_id]
            for segment in rest
        )
        self._note_prefixes(opened.segments, rest)
        self._segments = (*opened.segments, *rest)
        tokens += opened.tokens
        self._check(self._segments, tokens)
        return [
            Prompt(
                segments=self._segments,
                tokens=tokens,
                gap_tokens=opened.gap_tokens,
            )
        ]

    async def answered(self) -> None:
        await self._keep(self._segments)

    async def _rendered(self) -> tuple[PromptPiece, ...]:
        date = self._opening.date
        if date is None and self._files:
            date = self._files[0].document.date
        characters = sum(
            len(part)
            for message in self._messages
            for part in message.content
            if isinstance(part, str)
        )
        if characters <= SHORT_CHARACTERS:
            return self._prompts.pieces(self._messages, date=date)
        return await asyncio.to_thread(self._prompts.pieces, self._messages, date=date)

    def _note_prefixes(self, opening: Sequence[Segment], segments: Sequence[Segment]) -> None:
        """Says which files stand after something else than they were computed after."""
        by_id = {entry.document.id: entry for entry in self._files}
        before: tuple[int, ...] = opening[0].token_ids if opening else ()
        seen: list[str] = []
        differing = []
        for segment in segments:
            if segment.document_id is None:
                before = before + segment.token_ids if opening else segment.token_ids
                continue
            entry = by_id[segment.document_id]
            reason = None
            if segment.document_id in seen:
                reason = "it stands in the conversation twice"
            elif seen:
                reason = f"it stands after file {seen[-1]}"
            elif len(opening) > 1 or before != entry.prefix:
                reason = _first_difference(entry.prefix, before)
            if reason is not None and segment.link_tokens is None:
                entry.differed = reason
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

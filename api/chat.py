"""`POST /v1/chat/completions`: a conversation, with files in it by reference.

A question never tokenizes or resends its documents: the chat template is rendered around them, and
the engine is told their names. A document that is still being read is waited for; one that is read
but not yet computed is joined by the engine.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from api.attachments import Attachments
from api.auth import SINGLE_TENANT, tenant_of
from api.generation import Generation, Prompt
from api.library import Entry, Library
from api.reply import Body, Choice, Reply
from api.wire import ChatRequest, Message, TextPart, read_json
from longctx import prompt
from longctx.errors import InvalidRequest
from longctx.prompt import ChatPrompts, FilePart
from longctx.request import Segment

# A conversation of this length renders and tokenizes in about a millisecond; a longer one goes to
# a thread.
SHORT_CHARACTERS = 4096
NEWS_SECONDS = 1.0


class ChatShape:
    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, choice: Choice) -> Body:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"message": message, **self._ending(choice)}

    def opening(self, index: int) -> Body | None:
        return self._piece(index, {"role": "assistant", "content": ""})

    def delta(self, index: int, text: str) -> Body:
        return self._piece(index, {"content": text})

    def finish(self, choice: Choice) -> Body:
        return {"delta": {}, **self._ending(choice)}

    def _piece(self, index: int, delta: dict[str, Any]) -> Body:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _ending(self, choice: Choice) -> Body:
        return {
            "index": choice.index,
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }


class Chat:
    def __init__(
        self,
        generation: Generation,
        prompts: ChatPrompts,
        library: Library,
        attachments: Attachments,
        *,
        ping_seconds: float,
    ) -> None:
        self.generation = generation
        self.prompts = prompts
        self.library = library
        self.attachments = attachments
        self.ping_seconds = ping_seconds

    async def create(self, request: Request) -> Response:
        wanted = await read_json(request, ChatRequest)
        self.generation.check_model(wanted.model)
        tenant = tenant_of(request)
        messages, files = await self.read(wanted.messages, tenant)
        conversation = Conversation(messages, files, self.prompts, self.library)
        reply = Reply(self.generation, ChatShape(), conversation, wanted, tenant)
        return await reply.respond(request, ping_seconds=self.ping_seconds)

    async def read(
        self, messages: list[Message], tenant: str
    ) -> tuple[list[prompt.Message], list[Entry]]:
        """The messages and the files in them.

        Raises ApiError: 404 for an unknown file, 400 for one that came along and is no text.
        """
        files: dict[str, Entry] = {}
        read = []
        for message in messages:
            parts: list[str | FilePart] = []
            for part in message.parts:
                if isinstance(part, TextPart):
                    parts.append(part.text)
                    continue
                entry = await self.attachments.find(tenant, part.file)
                files[entry.document.id] = entry
                parts.append(FilePart(entry.document.id, entry.document.filename))
            role = "system" if message.role == "developer" else message.role
            read.append(prompt.Message(role, tuple(parts)))
        return read, list(files.values())

    async def tokens(self, messages: list[Message]) -> list[int]:
        """The prompt of a conversation without files, as the template makes it."""
        for number, message in enumerate(messages):
            if not all(isinstance(part, TextPart) for part in message.parts):
                raise InvalidRequest(
                    f"messages.{number} has a file; its tokens are counted in the file object",
                    param="messages",
                )
        read, _ = await self.read(messages, tenant=SINGLE_TENANT)
        segments = await asyncio.to_thread(self.prompts.render, read)
        return [token for segment in segments for token in segment.token_ids]


class Conversation:
    """Messages whose files have been found, on their way to be a prompt."""

    def __init__(
        self,
        messages: list[prompt.Message],
        files: list[Entry],
        prompts: ChatPrompts,
        library: Library,
    ) -> None:
        self.notes: Body = {}
        self._messages = messages
        self._files = files
        self._prompts = prompts
        self._library = library

    @property
    def is_ready(self) -> bool:
        return all(entry.tokenized.is_set() for entry in self._files)

    async def waiting(self) -> AsyncGenerator[Body, None]:
        for entry in self._files:
            while not await self._library.settled(entry, timeout_seconds=NEWS_SECONDS):
                yield {"waiting_for": entry.reading()}

    async def prompts(self) -> list[Prompt]:
        """Raises ApiError when a file has failed or was deleted."""
        for entry in self._files:
            self._library.check(entry)
        date = self._files[0].document.date if self._files else None
        characters = sum(
            len(part)
            for message in self._messages
            for part in message.content
            if isinstance(part, str)
        )
        if characters <= SHORT_CHARACTERS:
            segments = self._prompts.render(self._messages, date=date)
        else:
            segments = await asyncio.to_thread(self._prompts.render, self._messages, date=date)
        counts = {entry.document.id: entry.tokens for entry in self._files}
        tokens = sum(
            len(segment.token_ids) if segment.document_id is None else counts[segment.document_id]
            for segment in segments
        )
        self._note_prefixes(segments)
        return [Prompt(segments=segments, tokens=tokens)]

    def _note_prefixes(self, segments: tuple[Segment, ...]) -> None:
        """Says which files stand after something else than they were computed after."""
        by_id = {entry.document.id: entry for entry in self._files}
        before: tuple[int, ...] = ()
        seen: list[str] = []
        differing = []
        for segment in segments:
            if segment.document_id is None:
                before = segment.token_ids
                continue
            entry = by_id[segment.document_id]
            reason = None
            if segment.document_id in seen:
                reason = "it stands in the conversation twice"
            elif seen:
                reason = f"it stands after file {seen[-1]}"
            elif before != entry.prefix:
                reason = _first_difference(entry.prefix, before)
            if reason is not None:
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

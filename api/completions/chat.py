"""`POST /v1/chat/completions`: a conversation, with files in it by reference.

A question never tokenizes or resends its documents: the chat template is rendered around them, and
the engine is told their names. A document that is still being tokenized is waited for; the question
joins the computation of one that is tokenized but not yet computed.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from api.completions.attachments import Attachments
from api.completions.conversation import Conversation
from api.completions.generation import Generation
from api.completions.logprobs import ChatLogprobs
from api.completions.preamble_resolver import PreambleResolver
from api.completions.reply import Choice, Reply
from api.files.document import Document
from api.files.document_library import DocumentLibrary
from api.http.auth import SINGLE_TENANT, tenant_of
from api.http.bodies import ChatRequest
from api.http.message_bodies import Message, TextPart
from api.http.read_body import read_json
from api.http.sse import JSONObject
from api.stored_prompts.retention import Retention
from longctx.errors import InvalidRequest
from longctx.request import Segment, TokenLogprob
from longctx.text import chat_template
from longctx.text.chat_template import ChatPrompts, Ending, FilePart
from longctx.text.tokenizer import Tokenizer


class ChatFormat:
    """Writes choices as messages, and chunks as deltas of messages."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, logprobs: ChatLogprobs | None = None) -> None:
        """`logprobs` writes them, where they were asked for."""
        self._logprobs = logprobs

    def whole(self, choice: Choice) -> JSONObject:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        told = self._written(choice.logprobs)
        return {"message": message, **self._ending(choice), "logprobs": told}

    def first_delta(self, index: int) -> JSONObject | None:
        return self._piece(index, {"role": "assistant", "content": ""})

    def delta(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> JSONObject:
        piece = self._piece(index, {"content": text})
        return {**piece, "logprobs": self._written(logprobs)} if logprobs else piece

    def finish(self, choice: Choice) -> JSONObject:
        return {"delta": {}, **self._ending(choice)}

    def _written(self, told: Sequence[TokenLogprob]) -> JSONObject | None:
        return None if self._logprobs is None else self._logprobs.written(told)

    def _piece(self, index: int, delta: dict[str, Any]) -> JSONObject:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _ending(self, choice: Choice) -> JSONObject:
        return {
            "index": choice.index,
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }


class ChatRoutes:
    """Answers conversations: resolves what each refers to, then hands it to a `Reply`."""

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        prompts: ChatPrompts,
        library: DocumentLibrary,
        attachments: Attachments,
        preambles: PreambleResolver,
        retention: Retention,
        *,
        ping_seconds: float,
    ) -> None:
        self.generation = generation
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.library = library
        self.attachments = attachments
        self.preambles = preambles
        self.retention = retention
        self.ping_seconds = ping_seconds

    async def create(self, request: Request) -> Response:
        """Answers a conversation, in one piece or as server-sent events."""
        wanted = await read_json(request, ChatRequest)
        self.generation.check_model(wanted.model)
        tenant = tenant_of(request)
        messages, files = await self.read(wanted.messages, tenant)
        preamble, more = await self.preambles.resolve(wanted.prompt_cache, tenant)
        files = list({document.id: document for document in (*more, *files)}.values())
        keep_seconds = wanted.keep_seconds

        def check(segments: Sequence[Segment], tokens: int) -> None:
            if keep_seconds is not None:
                self.retention.check(segments, tokens)

        async def keep(segments: Sequence[Segment]) -> None:
            if keep_seconds is not None:
                await self.retention.retain(tenant, segments, keep_seconds)

        conversation = Conversation(
            messages,
            files,
            self.prompts,
            self.library,
            preamble,
            ending=wanted.ending,
            check=check,
            keep=keep,
        )
        written = ChatLogprobs(self.tokenizer) if wanted.logprobs else None
        reply = Reply(self.generation, ChatFormat(written), conversation, wanted, tenant)
        return await reply.respond(request, ping_seconds=self.ping_seconds)

    async def read(
        self, messages: list[Message], tenant: str
    ) -> tuple[list[chat_template.Message], list[Document]]:
        """Returns the messages for the chat template, and the files in them.

        Raises ApiError: 404 for an unknown file, 400 for one that came along and is no text.
        """
        files: dict[str, Document] = {}
        read = []
        for message in messages:
            parts: list[str | FilePart] = []
            for part in message.parts:
                if isinstance(part, TextPart):
                    parts.append(part.text)
                    continue
                document = await self.attachments.find(tenant, part.file)
                files[document.id] = document
                level = await self.preambles.reuse(part.reuse)
                parts.append(FilePart(document.id, document.record.filename, level.link_tokens))
            role = "system" if message.role == "developer" else message.role
            read.append(chat_template.Message(role, tuple(parts)))
        return read, list(files.values())

    async def tokens(self, messages: list[Message], ending: Ending) -> list[int]:
        """Returns the tokens of a conversation without files. Raises InvalidRequest for files."""
        for number, message in enumerate(messages):
            if not all(isinstance(part, TextPart) for part in message.parts):
                raise InvalidRequest(
                    f"messages.{number} has a file; its tokens are counted in the file object",
                    param="messages",
                )
        read, _ = await self.read(messages, tenant=SINGLE_TENANT)
        segments = await asyncio.to_thread(self.prompts.render, read, ending=ending)
        return [token for segment in segments for token in segment.token_ids]

"""`POST /v1/chat/completions`: a conversation, with files in it by reference.

A question never tokenizes or resends its documents: the chat template is rendered around them, and
the engine is told their names. A document that is still being tokenized is waited for; the question
joins the computation of one that is tokenized but not yet computed.
"""

import asyncio
import uuid
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from api.completions.answering import Answering
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
from api.http.errors import ApiError
from api.http.message_bodies import Message, TextPart
from api.http.read_body import read_json
from api.http.sse import JSONObject
from api.stored_prompts.retention import Retention
from longctx.errors import InvalidRequest
from longctx.request import Segment, TokenLogprob
from longctx.text import chat_template
from longctx.text.chat_template import ChatPrompts, Ending, FilePart
from longctx.text.tokenizer import Tokenizer
from longctx.text.tool_calls import ToolCall, ToolCallReader


class ChatFormat:
    """Writes choices as messages, and chunks as deltas of messages."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, logprobs: ChatLogprobs | None = None, *, reads_calls: bool = False) -> None:
        """`logprobs` writes them, where they were asked for; `reads_calls` says that the answers
        may have calls of tools in them."""
        self._logprobs = logprobs
        self._reads_calls = reads_calls
        self._readers: defaultdict[int, ToolCallReader] = defaultdict(ToolCallReader)

    def whole(self, choice: Choice) -> JSONObject:
        message: JSONObject = {"role": "assistant", "content": choice.text, "refusal": None}
        if self._reads_calls:
            reader = self._readers[choice.index]
            (said, calls), (rest, more) = reader.push(choice.text), reader.finish()
            if reader.calls:
                message["content"] = (said + rest).strip() or None
                message["tool_calls"] = [_call(call) for call in (*calls, *more)]
        told = self._written(choice.logprobs)
        return {"message": message, **self._ending(choice), "logprobs": told}

    def first_delta(self, index: int) -> JSONObject | None:
        return self._piece(index, {"role": "assistant", "content": ""})

    def delta(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> JSONObject:
        piece = self._piece(index, {"content": text})
        if self._reads_calls:
            reader = self._readers[index]
            before = reader.calls
            piece = self._piece(index, _delta(*reader.push(text), before))
        return {**piece, "logprobs": self._written(logprobs)} if logprobs else piece

    def finish(self, choice: Choice) -> JSONObject:
        delta: JSONObject = {}
        if self._reads_calls:
            reader = self._readers[choice.index]
            before = reader.calls
            text, calls = reader.finish()
            delta = _delta(text, calls, before) if text or calls else {}
        return {"delta": delta, **self._ending(choice)}

    def _written(self, told: Sequence[TokenLogprob]) -> JSONObject | None:
        return None if self._logprobs is None else self._logprobs.written(told)

    def _piece(self, index: int, delta: dict[str, Any]) -> JSONObject:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _ending(self, choice: Choice) -> JSONObject:
        called = self._reads_calls and self._readers[choice.index].calls
        stopped = choice.finish_reason == "stop"
        return {
            "index": choice.index,
            "logprobs": None,
            "finish_reason": "tool_calls" if called and stopped else choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }


def _call(call: ToolCall) -> JSONObject:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _delta(text: str, calls: Sequence[ToolCall], first: int) -> JSONObject:
    """Make a delta of text and calls, of which `first` came before."""
    delta: JSONObject = {"content": text}
    if calls:
        numbered = enumerate(calls, first)
        delta["tool_calls"] = [{"index": index, **_call(call)} for index, call in numbered]
    return delta


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
        answering = await self.ask(wanted, tenant_of(request))
        written = ChatLogprobs(self.tokenizer) if wanted.logprobs else None
        answer = ChatFormat(written, reads_calls=bool(wanted.offered))
        return await Reply(answering, answer).respond(request, ping_seconds=self.ping_seconds)

    async def ask(self, wanted: ChatRequest, tenant: str) -> Answering:
        """Finds what the conversation refers to, and returns it ready to be asked.

        Other APIs bring their questions here, as a `ChatRequest`, and write the answers themselves.
        Raises ApiError and InvalidRequest for what cannot be asked.
        """
        self.generation.check_model(wanted.model)
        tools = wanted.offered
        if tools and not self.tokenizer.takes_tools:
            raise ApiError(
                400,
                "this model's chat template has no place for tools, or has its calls written in a "
                "form that is not read (<tool_call>...</tool_call> is); leave tools out",
                param="tools",
                code="unsupported_value",
            )
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
            tools=tools,
            check=check,
            keep=keep,
        )
        return Answering(self.generation, conversation, wanted, tenant)

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
            calls = tuple(
                ToolCall(call.function.name, call.function.arguments)
                for call in message.tool_calls or ()
            )
            read.append(chat_template.Message(role, tuple(parts), calls))
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

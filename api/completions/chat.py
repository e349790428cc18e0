"""`POST /v1/chat/completions`: a conversation, with files in it by reference.

A question never tokenizes or resends its documents: the chat template is rendered around them, and
the engine is told their names. A document that is still being tokenized is waited for; the question
joins the computation of one that is tokenized but not yet computed.
"""

import asyncio
from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from api.completions.answering import Answering
from api.completions.attachments import Attachments
from api.completions.conversation import Conversation
from api.completions.generation import Generation
from api.completions.logprobs import ChatLogprobs
from api.completions.preamble import Preamble
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
from longctx.text.tool_calls import (
    CallArguments,
    CallBegun,
    Event,
    Said,
    ToolCall,
    ToolCallReader,
    joined,
)
from longctx.text.tool_forms import Tool, ToolForm


class ChatFormat:
    """Writes choices as messages, and chunks as deltas of messages."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self,
        logprobs: ChatLogprobs | None = None,
        *,
        calls: ToolForm | None = None,
        names: Collection[str] = (),
    ) -> None:
        """`logprobs` writes them, where they were asked for; `calls` is how the answers may have
        calls of tools in them, whose `names` these are."""
        self._logprobs = logprobs
        self._calls = calls
        reader = partial(ToolCallReader, calls, names) if calls is not None else None
        self._readers: defaultdict[int, ToolCallReader] = defaultdict(reader)

    def whole(self, choice: Choice) -> JSONObject:
        message: JSONObject = {"role": "assistant", "content": choice.text, "refusal": None}
        if self._calls is not None:
            reader = self._readers[choice.index]
            text, calls = joined([*reader.push(choice.text), *reader.finish()])
            if calls:
                message["content"] = text or None
                message["tool_calls"] = [
                    {"id": self._calls.call_id(), "type": "function", "function": _function(call)}
                    for call in calls
                ]
        told = self._written(choice.logprobs)
        return {"message": message, **self._ending(choice), "logprobs": told}

    def first_delta(self, index: int) -> JSONObject | None:
        return self._piece(index, {"role": "assistant", "content": ""})

    def delta(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> JSONObject:
        piece = self._piece(index, {"content": text})
        if self._calls is not None:
            reader = self._readers[index]
            before = reader.calls
            piece = self._piece(index, _delta(reader.push(text), before, self._calls))
        return {**piece, "logprobs": self._written(logprobs)} if logprobs else piece

    def finish(self, choice: Choice) -> JSONObject:
        delta: JSONObject = {}
        if self._calls is not None:
            reader = self._readers[choice.index]
            before = reader.calls
            events = reader.finish()
            delta = _delta(events, before, self._calls) if events else {}
        return {"delta": delta, **self._ending(choice)}

    def _written(self, told: Sequence[TokenLogprob]) -> JSONObject | None:
        return None if self._logprobs is None else self._logprobs.written(told)

    def _piece(self, index: int, delta: dict[str, Any]) -> JSONObject:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _ending(self, choice: Choice) -> JSONObject:
        called = self._calls is not None and self._readers[choice.index].calls
        stopped = choice.finish_reason == "stop"
        return {
            "index": choice.index,
            "logprobs": None,
            "finish_reason": "tool_calls" if called and stopped else choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }


def _function(call: ToolCall) -> JSONObject:
    return {"name": call.name, "arguments": call.arguments}


def _delta(events: Sequence[Event], calls: int, form: ToolForm) -> JSONObject:
    """Make a delta of events; so many `calls` were begun before them."""
    text = ""
    told: dict[int, JSONObject] = {}
    for event in events:
        match event:
            case Said():
                text += event.text
            case CallBegun():
                function = {"name": event.name, "arguments": ""}
                head = {"index": calls, "id": form.call_id(), "type": "function"}
                told[calls] = {**head, "function": function}
                calls += 1
            case CallArguments():
                index = calls - 1
                call = told.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += event.text
    if not told:
        return {"content": text}
    return {**({"content": text} if text else {}), "tool_calls": list(told.values())}


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
        answer = ChatFormat(
            written,
            calls=self.tokenizer.tool_form if wanted.offered else None,
            names=[tool.name for tool in wanted.offered],
        )
        return await Reply(answering, answer).respond(request, ping_seconds=self.ping_seconds)

    async def ask(
        self,
        wanted: ChatRequest,
        tenant: str,
        *,
        sources: tuple[str, ...] = (),
        begins: tuple[Preamble, list[Document]] | None = None,
    ) -> Answering:
        """Finds what the conversation refers to, and returns it ready to be asked.

        Other APIs bring their questions here, as a `ChatRequest`, and write the answers themselves.
        `sources` name what else has its text in the conversation, as `Request.sources`; `begins` is
        a preamble of theirs, with its files, in place of what `prompt_cache` names.
        Raises ApiError and InvalidRequest for what cannot be asked.
        """
        self.generation.check_model(wanted.model)
        tools = wanted.offered
        self.check_tools(tools)
        messages, files = await self.read(wanted.messages, tenant)
        preamble, more = begins or await self.preambles.resolve(wanted.prompt_cache, tenant)
        files = list({document.id: document for document in (*more, *files)}.values())
        keep_seconds = wanted.keep_seconds

        def check(segments: Sequence[Segment], tokens: int) -> None:
            if keep_seconds is not None:
                self.retention.check(segments, tokens)

        async def keep(segments: Sequence[Segment]) -> None:
            if keep_seconds is not None:
                await self.retention.retain(tenant, segments, keep_seconds, sources)

        conversation = Conversation(
            messages,
            files,
            self.prompts,
            self.library,
            preamble,
            ending=wanted.ending,
            tools=tools,
            sources=sources,
            check=check,
            keep=keep,
        )
        return Answering(self.generation, conversation, wanted, tenant)

    def check_tools(self, tools: Sequence[Tool]) -> None:
        """Raises ApiError where there are tools, and a model that is not known to call them."""
        if tools and self.tokenizer.tool_form is None:
            raise ApiError(
                400,
                "this model's chat template has no place for tools, or has its calls written in a "
                "form that is not read (docs/openai.md has those that are); leave tools out",
                param="tools",
                code="unsupported_value",
            )

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
                ToolCall(call.function.name, call.function.arguments, call.id)
                for call in message.tool_calls or ()
            )
            answered = message.tool_call_id or ""
            read.append(chat_template.Message(role, tuple(parts), calls, answered))
        return read, list(files.values())

    async def tokens(
        self, messages: list[Message], ending: Ending, tools: Sequence[Tool] = ()
    ) -> list[int]:
        """Returns the tokens of a conversation without files. Raises InvalidRequest for files."""
        self.check_tools(tools)
        for number, message in enumerate(messages):
            if not all(isinstance(part, TextPart) for part in message.parts):
                raise InvalidRequest(
                    f"messages.{number} has a file; its tokens are counted in the file object",
                    param="messages",
                )
        read, _ = await self.read(messages, tenant=SINGLE_TENANT)
        segments = await asyncio.to_thread(self.prompts.render, read, ending=ending, tools=tools)
        return [token for segment in segments for token in segment.token_ids]

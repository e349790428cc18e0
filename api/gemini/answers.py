"""Writes answers as Gemini does: candidates with parts, whole or as a stream of pieces."""

import json
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.completions.answering import Answering
from api.completions.logprobs import LOWEST, token_name
from api.completions.reply import Choice, collect
from api.http.refusals import gemini_body
from api.http.sse import EventForm, EventStream, JSONObject, encode_event, while_connected
from longctx.request import RequestOutput, TokenLogprob
from longctx.text.tokenizer import Tokenizer
from longctx.text.tool_calls import (
    CallArguments,
    CallBegun,
    Event,
    Said,
    ToolCall,
    ToolCallReader,
)

FINISH = {"stop": "STOP", "length": "MAX_TOKENS", "abort": "OTHER", "error": "OTHER"}
# Google's clients take every line that is not empty and no `data:` for JSON, so also a comment.
EMPTY_LINE = b"\n"
EVENTS = EventForm(encode_event, EMPTY_LINE, last=b"", failure=gemini_body)


def array_form() -> EventForm:
    """Makes the form of one stream that is a JSON array, written element by element."""
    return EventForm(
        _element_writer(), EMPTY_LINE, last=b"]", failure=gemini_body, media_type="application/json"
    )


def _element_writer() -> Callable[[JSONObject], bytes]:
    begun = False

    def write(data: JSONObject) -> bytes:
        nonlocal begun
        before = b",\n" if begun else b"["
        begun = True
        return before + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()

    return write


class GeminiReply:
    """Writes the answer to one question; `whole` or `stream` is called once."""

    def __init__(
        self,
        answering: Answering,
        tokenizer: Tokenizer,
        *,
        functions: Collection[str],
        logprobs: bool,
    ) -> None:
        """`functions` are the names of those that may be called in the answers."""
        self.answering = answering
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        form = tokenizer.tool_form if functions else None
        self._form = form
        reader = None if form is None else partial(ToolCallReader, form, functions)
        self._readers: defaultdict[int, ToolCallReader] = defaultdict(reader)
        self._open: dict[int, ToolCall] = {}  # the call of each candidate that is being written
        self._faulty: set[int] = set()  # candidates with a call whose arguments are no object
        self._id = uuid.uuid4().hex

    async def whole(self, request: Request) -> Response:
        """Returns the answer in one piece."""
        self.answering.check()
        return JSONResponse(await while_connected(request, self._whole()))

    async def stream(self, form: EventForm, *, ping_seconds: float) -> Response:
        """Returns the answer as a stream that has yet to begin."""
        self.answering.check()
        await self.answering.prepare()
        return EventStream(self._pieces(), ping_seconds=ping_seconds, form=form)

    async def _whole(self) -> JSONObject:
        choices: dict[int, Choice] = {}
        async with aclosing(self.answering.outputs()) as outputs:
            async for output in outputs:
                if isinstance(output, RequestOutput):
                    collect(choices, output)
        candidates = []
        for index in sorted(choices):
            choice = choices[index]
            parts = [*self._parts(index, choice.text), *self._rest(index)]
            candidates.append(
                {
                    **self._candidate(index, parts, choice.logprobs),
                    **self._ending(choice),
                    **self._average(choice.logprobs),
                }
            )
        return self._body(candidates, usageMetadata=self._usage())

    async def _pieces(self) -> AsyncGenerator[JSONObject, None]:
        choices: dict[int, Choice] = {}
        last: JSONObject | None = None  # held back: the very last one has the counts
        async with aclosing(self.answering.outputs()) as outputs:
            async for output in outputs:
                if last is not None:
                    yield last
                    last = None
                if not isinstance(output, RequestOutput):
                    continue
                choice = collect(choices, output)
                index = output.index
                parts = self._parts(index, output.text)
                if parts or output.logprobs:
                    yield self._body([self._candidate(index, parts, output.logprobs)])
                if output.finish_reason is not None:
                    candidate = self._candidate(index, self._rest(index) or [{"text": ""}])
                    last = self._body([{**candidate, **self._ending(choice)}])
        if last is not None:
            yield {**last, "usageMetadata": self._usage()}

    def _parts(self, index: int, text: str) -> list[JSONObject]:
        if self._form is None:
            return [{"text": text}] if text else []
        return self._written(index, self._readers[index].push(text))

    def _rest(self, index: int) -> list[JSONObject]:
        """Returns what was kept back because it may have become a call, or is none to its end."""
        if self._form is None:
            return []
        return [*self._written(index, self._readers[index].finish()), *self._left(index)]

    def _written(self, index: int, events: Sequence[Event]) -> list[JSONObject]:
        """Returns the parts that are whole; a call is once its arguments are an object."""
        parts: list[JSONObject] = []
        for event in events:
            match event:
                case Said():
                    parts += [*self._left(index), {"text": event.text}]
                case CallBegun():
                    parts += self._left(index)
                    self._open[index] = ToolCall(event.name, "")
                case CallArguments() if index in self._open:  # else it is space after the object
                    call = self._open[index]
                    call = replace(call, arguments=call.arguments + event.text)
                    self._open[index] = call
                    if (arguments := _object(call.arguments)) is not None:
                        del self._open[index]
                        assert self._form is not None
                        told = {"id": self._form.call_id(), "name": call.name, "args": arguments}
                        parts.append({"functionCall": told})
        return parts

    def _left(self, index: int) -> list[JSONObject]:
        """Returns a call that has ended before its arguments were an object, as text."""
        call = self._open.pop(index, None)
        if call is None:
            return []
        self._faulty.add(index)
        return [{"text": json.dumps({"name": call.name, "args": call.arguments})}]

    def _candidate(
        self, index: int, parts: list[JSONObject], told: Sequence[TokenLogprob] = ()
    ) -> JSONObject:
        candidate: JSONObject = {"content": {"parts": parts, "role": "model"}, "index": index}
        if self._logprobs and told:
            candidate["logprobsResult"] = {
                "topCandidates": [
                    {"candidates": [self._likely(*likely) for likely in one.likeliest]}
                    for one in told
                ],
                "chosenCandidates": [self._likely(one.token_id, one.logprob) for one in told],
            }
        return candidate

    def _likely(self, token_id: int, logprob: float | None) -> JSONObject:
        return {
            "token": token_name(self._tokenizer.token_bytes(token_id)),
            "tokenId": token_id,
            "logProbability": LOWEST if logprob is None else max(LOWEST, logprob),
        }

    def _average(self, told: Sequence[TokenLogprob]) -> JSONObject:
        values = [max(LOWEST, one.logprob) for one in told if one.logprob is not None]
        if not self._logprobs or not values:
            return {}
        return {"avgLogprobs": sum(values) / len(values)}

    def _ending(self, choice: Choice) -> JSONObject:
        if choice.index in self._faulty:
            return {
                "finishReason": "MALFORMED_FUNCTION_CALL",
                "finishMessage": "the model wrote a call whose arguments are no JSON object",
            }
        return {"finishReason": FINISH[choice.finish_reason or "stop"]}

    def _usage(self) -> JSONObject:
        totals = self.answering.totals
        cached = totals.cached
        return {
            "promptTokenCount": totals.prompt,
            "cachedContentTokenCount": cached,
            "candidatesTokenCount": totals.completion,
            "totalTokenCount": totals.prompt + totals.completion,
            "promptTokensDetails": [{"modality": "TEXT", "tokenCount": totals.prompt}],
            "cacheTokensDetails": [{"modality": "TEXT", "tokenCount": cached}],
        }

    def _body(self, candidates: list[JSONObject], **more: Any) -> JSONObject:
        return {
            "candidates": candidates,
            "modelVersion": self.answering.generation.served_name,
            "responseId": self._id,
            **more,
        }


def _object(arguments: str) -> JSONObject | None:
    if not arguments.rstrip().endswith("}"):  # most pieces of a long one
        return None
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None

"""Writes an answer as the items of a response, and the events of a stream that tell of them.

response.created, response.in_progress
for each item     output_item.added, of a message then content_part.added, its deltas and done,
                  of a call its arguments and done; output_item.done
at the end        response.completed, response.incomplete or response.failed
"""

from collections.abc import Iterator, Sequence

from api.completions.logprobs import ChatLogprobs
from api.http.sse import JSONObject
from api.responses.question import new_id
from longctx.request import RequestOutput, TokenLogprob
from longctx.text.tool_calls import ToolCall, ToolCallReader


class ItemWriter:
    """Writes the output of one response. `push` each output, then `finish`; then `items` is whole.

    Both return the events that tell of what is new, which have no numbers yet.
    """

    def __init__(self, *, reads_calls: bool, logprobs: ChatLogprobs | None) -> None:
        """`reads_calls`: the answer may have calls in it. `logprobs` writes them, where they were
        asked for."""
        self.items: list[JSONObject] = []
        self._reader = ToolCallReader() if reads_calls else None
        self._logprobs = logprobs
        self._told: list[TokenLogprob] = []  # of text that is held back
        self._open: JSONObject | None = None  # the message that is being written
        self._texts: list[str] = []  # of it
        self._likely: list[JSONObject] = []

    def push(self, output: RequestOutput) -> Iterator[JSONObject]:
        self._told += output.logprobs
        if self._reader is None:
            yield from self._say(output.text)
        else:
            yield from self._say_and_call(*self._reader.push(output.text))

    def finish(self, *, complete: bool) -> Iterator[JSONObject]:
        """Ends the last item; `complete` says whether the answer is."""
        if self._reader is not None:
            yield from self._say_and_call(*self._reader.finish())
        if not self.items:
            yield from self._begin()
        if self._open is not None:
            if self._told:
                yield from self._delta("")
            yield from self._end("completed" if complete else "incomplete")

    def _say_and_call(self, text: str, calls: Sequence[ToolCall]) -> Iterator[JSONObject]:
        yield from self._say(text)
        for call in calls:
            if self._open is not None:
                yield from self._end("completed")
            yield from self._call(call)

    def _say(self, text: str) -> Iterator[JSONObject]:
        if text:
            if self._open is None:
                yield from self._begin()
            yield from self._delta(text)

    def _begin(self) -> Iterator[JSONObject]:
        self._texts, self._likely = [], []
        self._open = {
            "id": new_id("msg"),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        self.items.append(self._open)
        yield {
            "type": "response.output_item.added",
            "output_index": len(self.items) - 1,
            "item": dict(self._open),
        }
        yield self._event("response.content_part.added", part=self._part())

    def _delta(self, text: str) -> Iterator[JSONObject]:
        told, self._told = self._told, []
        likely = [] if self._logprobs is None else self._logprobs.written(told)["content"]
        self._texts.append(text)
        self._likely += likely
        yield self._event("response.output_text.delta", delta=text, logprobs=likely)

    def _end(self, status: str) -> Iterator[JSONObject]:
        assert self._open is not None
        part = self._part()
        yield self._event(
            "response.output_text.done", text=part["text"], logprobs=list(self._likely)
        )
        yield self._event("response.content_part.done", part=part)
        self.items[-1] = {**self._open, "status": status, "content": [part]}
        self._open = None
        yield self._done()

    def _call(self, call: ToolCall) -> Iterator[JSONObject]:
        item = {
            "id": new_id("fc"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": new_id("call"),
            "name": call.name,
            "arguments": "",
        }
        self.items.append({**item, "status": "completed", "arguments": call.arguments})
        where = {"item_id": item["id"], "output_index": len(self.items) - 1}
        yield {
            "type": "response.output_item.added",
            "output_index": where["output_index"],
            "item": item,
        }
        told = "response.function_call_arguments"
        yield {"type": f"{told}.delta", **where, "delta": call.arguments}
        yield {"type": f"{told}.done", **where, "name": call.name, "arguments": call.arguments}
        yield self._done()

    def _done(self) -> JSONObject:
        return {
            "type": "response.output_item.done",
            "output_index": len(self.items) - 1,
            "item": self.items[-1],
        }

    def _event(self, kind: str, **more: object) -> JSONObject:
        assert self._open is not None
        where = {"item_id": self._open["id"], "output_index": len(self.items) - 1}
        return {"type": kind, **where, "content_index": 0, **more}

    def _part(self) -> JSONObject:
        part = {"type": "output_text", "text": "".join(self._texts), "annotations": []}
        return {**part, "logprobs": list(self._likely)}

"""Writes an answer as the items of a response, and the events of a stream that tell of them.

response.created, response.in_progress
for each item     output_item.added, of a message then content_part.added, its deltas and done,
                  of a call its arguments and done; output_item.done
at the end        response.completed, response.incomplete or response.failed
"""

from collections.abc import Collection, Iterable, Iterator

from api.completions.logprobs import ChatLogprobs
from api.http.sse import JSONObject
from api.responses.question import new_id
from longctx.request import RequestOutput, TokenLogprob
from longctx.text.tool_calls import CallBegun, Event, Said, ToolCallReader
from longctx.text.tool_forms import ToolForm


class ItemWriter:
    """Writes the output of one response. `push` each output, then `finish`; then `items` is whole.

    Both return the events that tell of what is new, which have no numbers yet.
    """

    def __init__(
        self, form: ToolForm | None, names: Collection[str], logprobs: ChatLogprobs | None
    ) -> None:
        """`form`: how the answer may have calls in it, of functions with these `names`. `logprobs`
        writes them, where they were asked for."""
        self.items: list[JSONObject] = []
        self._form = form
        self._reader = None if form is None else ToolCallReader(form, names)
        self._logprobs = logprobs
        self._told: list[TokenLogprob] = []  # of text that is held back
        self._open: JSONObject | None = None  # the item that is being written
        self._texts: list[str] = []  # of it
        self._likely: list[JSONObject] = []

    def push(self, output: RequestOutput) -> Iterator[JSONObject]:
        self._told += output.logprobs
        read = [Said(output.text)] if self._reader is None else self._reader.push(output.text)
        yield from self._write(read)

    def finish(self, *, complete: bool) -> Iterator[JSONObject]:
        """Ends the last item; `complete` says whether the answer is."""
        if self._reader is not None:
            yield from self._write(self._reader.finish())
        if not self.items:
            yield from self._begin()
        if self._open is not None:
            if self._told and self._is_message:
                yield from self._delta("")
            yield from self._end("completed" if complete else "incomplete")

    @property
    def _is_message(self) -> bool:
        return self._open is not None and self._open["type"] == "message"

    def _write(self, events: Iterable[Event]) -> Iterator[JSONObject]:
        for event in events:
            if isinstance(event, CallBegun):
                yield from self._end("completed")
                yield from self._begin_call(event.name)
            elif isinstance(event, Said):
                if event.text:
                    if not self._is_message:
                        yield from self._end("completed")
                        yield from self._begin()
                    yield from self._delta(event.text)
            else:
                self._told = []  # a call's: there is no place for them
                self._texts.append(event.text)
                kind = "response.function_call_arguments.delta"
                yield self._event(kind, delta=event.text)

    def _begin(self) -> Iterator[JSONObject]:
        self._texts, self._likely = [], []
        self._open = {
            "id": new_id("msg"),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        yield self._added()
        yield self._event("response.content_part.added", content_index=0, part=self._part())

    def _begin_call(self, name: str) -> Iterator[JSONObject]:
        assert self._form is not None
        self._texts = []
        self._open = {
            "id": new_id("fc"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": self._form.call_id(),
            "name": name,
            "arguments": "",
        }
        yield self._added()

    def _added(self) -> JSONObject:
        assert self._open is not None
        self.items.append(self._open)
        where = {"output_index": len(self.items) - 1, "item": self._open}
        return {"type": "response.output_item.added", **where}

    def _delta(self, text: str) -> Iterator[JSONObject]:
        told, self._told = self._told, []
        likely = [] if self._logprobs is None else self._logprobs.written(told)["content"]
        self._texts.append(text)
        self._likely += likely
        yield self._event(
            "response.output_text.delta", content_index=0, delta=text, logprobs=likely
        )

    def _end(self, status: str) -> Iterator[JSONObject]:
        """Ends the item that is being written, where there is one."""
        if self._open is None:
            return
        text = "".join(self._texts)
        if self._is_message:
            part = self._part()
            told = {"content_index": 0, "text": text, "logprobs": part["logprobs"]}
            yield self._event("response.output_text.done", **told)
            yield self._event("response.content_part.done", content_index=0, part=part)
            self.items[-1] = {**self._open, "status": status, "content": [part]}
        else:
            named = {"name": self._open["name"], "arguments": text}
            yield self._event("response.function_call_arguments.done", **named)
            self.items[-1] = {**self._open, "status": status, "arguments": text}
        self._open = None
        where = {"output_index": len(self.items) - 1, "item": self.items[-1]}
        yield {"type": "response.output_item.done", **where}

    def _event(self, kind: str, **more: object) -> JSONObject:
        assert self._open is not None
        where = {"item_id": self._open["id"], "output_index": len(self.items) - 1}
        return {"type": kind, **where, **more}

    def _part(self) -> JSONObject:
        part = {"type": "output_text", "text": "".join(self._texts), "annotations": []}
        return {**part, "logprobs": list(self._likely)}

"""Writes an answer as the blocks of a message, and the events of a stream that tell of them.

message_start
for each block  content_block_start, content_block_delta ..., content_block_stop
at the end      message_delta with the reason and the usage, message_stop
"""

import json
from collections.abc import Collection, Iterable, Iterator
from uuid import uuid4

from api.http.sse import JSONObject
from longctx.request import RequestOutput
from longctx.text.tool_calls import CallBegun, Event, Said, ToolCallReader
from longctx.text.tool_forms import ToolForm


class BlockWriter:
    """Writes the content of one message. `push` each output, then `finish`; then `blocks` is whole.

    Both return the events that tell of what is new.
    """

    def __init__(self, form: ToolForm | None, names: Collection[str]) -> None:
        """`form`: how the answer may have calls in it, of tools with these `names`."""
        self.blocks: list[JSONObject] = []
        self._reader = None if form is None else ToolCallReader(form, names)
        self._open: JSONObject | None = None  # the block that is being written
        self._texts: list[str] = []  # of it

    @property
    def calls(self) -> int:
        return 0 if self._reader is None else self._reader.calls

    def push(self, output: RequestOutput) -> Iterator[JSONObject]:
        read = [Said(output.text)] if self._reader is None else self._reader.push(output.text)
        yield from self._write(read)

    def finish(self) -> Iterator[JSONObject]:
        """Ends the last block."""
        if self._reader is not None:
            yield from self._write(self._reader.finish())
        yield from self._end()

    def _write(self, events: Iterable[Event]) -> Iterator[JSONObject]:
        for event in events:
            if isinstance(event, CallBegun):
                yield from self._end()
                begun = {"type": "tool_use", "id": f"toolu_{uuid4().hex[:24]}", "name": event.name}
                yield self._begin({**begun, "input": {}})
            elif isinstance(event, Said):
                if event.text:
                    if self._open is None or self._open["type"] != "text":
                        yield from self._end()
                        yield self._begin({"type": "text", "text": ""})
                    yield self._delta({"type": "text_delta", "text": event.text})
            else:
                yield self._delta({"type": "input_json_delta", "partial_json": event.text})

    def _begin(self, block: JSONObject) -> JSONObject:
        self._open, self._texts = block, []
        self.blocks.append(block)
        return {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: JSONObject) -> JSONObject:
        self._texts.append(delta["text"] if "text" in delta else delta["partial_json"])
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _end(self) -> Iterator[JSONObject]:
        if self._open is None:
            return
        text = "".join(self._texts)
        is_text = self._open["type"] == "text"
        told = {"text": text} if is_text else {"input": _input(text)}
        self.blocks[-1] = {**self._open, **told}
        self._open = None
        yield {"type": "content_block_stop", "index": self._index}

    @property
    def _index(self) -> int:
        return len(self.blocks) - 1


def _input(text: str) -> JSONObject:
    """Reads the arguments of a call; those that are cut short, or no object, are told as text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": text}

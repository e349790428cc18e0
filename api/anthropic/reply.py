"""One message on its way: the object that clients get, and the events that lead to it."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from uuid import uuid4

from api.anthropic.marks import MarkedConversation
from api.anthropic.writer import BlockWriter
from api.completions.answering import Answering
from api.http.sse import JSONObject
from longctx.request import RequestOutput

PING: JSONObject = {"type": "ping"}


@dataclass(slots=True)
class MessageReply:
    """Answers one request. `whole` or `events` is called once."""

    answering: Answering
    marked: MarkedConversation
    writer: BlockWriter
    id: str = field(default_factory=lambda: f"msg_{uuid4().hex}")
    finish_reason: str | None = None
    stop: str | int | None = None
    found_tokens: int = 0  # as far as is known

    async def whole(self) -> JSONObject:
        """Returns the message once it is complete. Raises what the client is told."""
        async with aclosing(self._written()) as events:
            async for _ in events:
                pass
        return {**self._message(self.writer.blocks), **self._reason(), "usage": self._usage()}

    async def events(self) -> AsyncGenerator[JSONObject, None]:
        """Yields the events of a stream."""
        begun = False
        async with aclosing(self._written()) as events:
            async for event in events:
                if not begun:
                    begun = True
                    yield {"type": "message_start", "message": self._message([])}
                    yield PING
                if event is not None:
                    yield event
        usage = self._usage()
        yield {"type": "message_delta", "delta": self._reason(), "usage": usage}
        yield {"type": "message_stop"}

    async def _written(self) -> AsyncGenerator[JSONObject | None, None]:
        """Yields the events of blocks, and None when the answer begins without one."""
        async with aclosing(self.answering.outputs()) as outputs:
            async for output in outputs:
                if not isinstance(output, RequestOutput):
                    continue
                if output.progress is not None:
                    self.found_tokens = output.progress.cache
                for event in self.writer.push(output):
                    yield event
                if output.finish_reason is not None:
                    self.finish_reason = output.finish_reason.value
                    self.stop = output.stop_reason
                    yield None
        for event in self.writer.finish():
            yield event

    def _message(self, content: list[JSONObject]) -> JSONObject:
        prompt = sum(made.tokens for made in self.answering.prompts)
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.answering.generation.served_name,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**self._input_usage(prompt, self.found_tokens), "output_tokens": 0},
        }

    def _reason(self) -> JSONObject:
        reason, sequence = "end_turn", None
        if self.finish_reason == "length":
            reason = "max_tokens"
        elif self.writer.calls:
            reason = "tool_use"
        elif isinstance(self.stop, str):
            reason, sequence = "stop_sequence", self.stop
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _usage(self) -> JSONObject:
        totals = self.answering.totals
        usage = self._input_usage(totals.prompt, totals.cached)
        return {**usage, "output_tokens": totals.completion, "service_tier": "standard"}

    def _input_usage(self, prompt: int, found: int) -> JSONObject:
        """Parts the prompt's tokens into those that were found, those that are newly computed into
        full blocks up to a mark, and the rest."""
        block_tokens = self.answering.generation.engine.info.block_tokens

        def sealed(marked: int) -> int:
            return max(0, min(marked, prompt) // block_tokens * block_tokens - found)

        written, for_an_hour = sealed(self.marked.marked_tokens), sealed(self.marked.hour_tokens)
        return {
            "input_tokens": prompt - found - written,
            "cache_creation_input_tokens": written,
            "cache_read_input_tokens": found,
            "cache_creation": {
                "ephemeral_5m_input_tokens": written - for_an_hour,
                "ephemeral_1h_input_tokens": for_an_hour,
            },
        }

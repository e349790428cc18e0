"""What `cache_control` marks of a prompt: how much of it is found again, and kept for an hour."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from api.anthropic.blocks import CacheControl
from api.completions.answering import PromptSource
from api.completions.conversation import Conversation
from api.completions.generation import EnginePrompt
from api.http.sse import JSONObject
from api.stored_prompts.retention import Retention
from longctx.request import Segment
from longctx.text.chat_template import Message

HOUR_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class Mark:
    """Holds the messages until a mark."""

    until: list[Message]
    control: CacheControl


class MarkedConversation(PromptSource):
    """A conversation that knows how many tokens of its prompt are marked, once that is made.

    What is marked for an hour is retained for so long when it has been answered.
    """

    def __init__(
        self, inner: Conversation, marks: Sequence[Mark], retention: Retention, tenant: str
    ) -> None:
        super().__init__()
        self.notes = inner.notes
        self.marked_tokens = 0  # up to the last mark
        self.hour_tokens = 0  # up to the last one of an hour
        self._inner = inner
        self._marks = marks
        self._retention = retention
        self._tenant = tenant
        self._kept: list[Segment] = []

    @property
    def prompt_cache(self) -> JSONObject:
        return self._inner.prompt_cache

    @property
    def is_ready(self) -> bool:
        return self._inner.is_ready

    async def waiting(self) -> AsyncGenerator[JSONObject, None]:
        async for news in self._inner.waiting():
            yield news

    async def prompts(self) -> list[EnginePrompt]:
        """Raises ContextTooLong, too, where what is marked for an hour is too long to be kept."""
        made = await self._inner.prompts()
        if self._marks:
            self.marked_tokens = await self._inner.shared_tokens(self._marks[-1].until)
        hours = [mark for mark in self._marks if mark.control.ttl == "1h"]
        if hours:
            last = hours[-1] is self._marks[-1]
            self.hour_tokens = (
                self.marked_tokens if last else await self._inner.shared_tokens(hours[-1].until)
            )
            self._kept, tokens = self._inner.first_segments(self.hour_tokens)
            self._retention.check(self._kept, tokens)
        return made

    async def on_answered(self) -> None:
        await self._inner.on_answered()
        if self._kept:
            await self._retention.retain(self._tenant, self._kept, HOUR_SECONDS)

"""Takes one question from its prompts to the engine's outputs; whatever API it came by.

Who writes the answer, in the words of an API, consumes `Answering.outputs`: `reply.py` does so for
OpenAI's chats and completions.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from api.completions.echo import with_prompts
from api.completions.generation import EnginePrompt, Generation
from api.completions.waiting import Waitable
from api.http.bodies import GenerationRequest
from api.http.errors import logger
from api.http.sse import JSONObject
from longctx.request import CacheExplanation, RequestOutput, Usage
from longctx.request import Request as EngineRequest


class PromptSource(Waitable, ABC):
    """Makes the prompts of one request, which may have to wait for documents.

    It is used in this order: `waiting`, `prompts`, and `on_answered` once the answer is complete.
    """

    def __init__(self) -> None:
        self.notes: JSONObject = {}  # for the answer's object `longctx`

    @property
    def prompt_cache(self) -> JSONObject:
        """The answer's object `prompt_cache`, which is left out when it is empty: how what the
        conversation begins with was used."""
        return {}

    @abstractmethod
    async def prompts(self) -> list[EnginePrompt]:
        """Returns the prompts, when nothing is waited for. Raises what the client is told."""

    async def on_answered(self) -> None:
        """Is called when all prompts have been answered. What it raises is logged."""


@dataclass(slots=True)
class UsageTotals:
    """Adds up the token counts of all prompts of one request."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    computed: int = 0
    reused: int = 0
    linked: int = 0
    explanation: CacheExplanation | None = None

    def add(self, usage: Usage) -> None:
        self.prompt += usage.prompt_tokens
        self.cached += usage.cached_tokens
        self.completion += usage.completion_tokens
        self.computed += usage.computed_tokens
        self.reused += usage.reused_tokens
        self.linked += usage.linked_tokens
        self.explanation = usage.explanation

    def usage(self) -> JSONObject:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(slots=True)
class Answering:
    """Asks one question. `check` comes first, `prepare` where it can, `outputs` once."""

    generation: Generation
    prompt_source: PromptSource
    wanted: GenerationRequest
    salt: str
    totals: UsageTotals = field(default_factory=UsageTotals)  # complete when `outputs` has ended
    prompts: list[EnginePrompt] = field(default_factory=list)  # once they are made
    _requests: list[EngineRequest] | None = None

    @property
    def sealed_tokens(self) -> int:
        """Counts the tokens that were computed into full blocks, where later prompts find them, of
        a prompt that reuses nothing out of place."""
        block_tokens = self.generation.engine.info.block_tokens
        return max(0, self.totals.prompt // block_tokens * block_tokens - self.totals.cached)

    def check(self) -> None:
        """Raises InvalidRequest for a value out of range, before anything is waited for."""
        self.generation.sampling(self.wanted, 0)

    async def prepare(self) -> None:
        """Makes the prompts, where nothing has to be waited for: what is wrong with them is then
        raised before an answer has begun."""
        if self.prompt_source.is_ready:
            await self._prepare()

    async def count(self) -> int:
        """Counts the tokens of all prompts, once nothing is waited for, and asks nothing."""
        async with aclosing(self.prompt_source.waiting()) as news:
            async for _ in news:
                pass
        return sum(prompt.tokens for prompt in await self.prompt_source.prompts())

    async def outputs(self) -> AsyncGenerator[RequestOutput | JSONObject, None]:
        """Yields what is waited for, as objects, then the outputs of all prompts.

        Closing it aborts the question. Raises what the client is told.
        """
        async with aclosing(self.prompt_source.waiting()) as news:
            async for item in news:
                yield item
        requests = self._requests or await self._prepare()
        outputs = self.generation.outputs(requests)
        if self.wanted.echoes:
            texts = [prompt.text for prompt in self.prompts]
            outputs = with_prompts(outputs, texts, choices=requests[0].sampling.n)
        async with aclosing(outputs):
            async for output in outputs:
                if output.usage is not None:
                    self.totals.add(output.usage)
                yield output
        try:
            await self.prompt_source.on_answered()
        except Exception as error:  # the answer is complete, and not to be taken back
            logger.error("keeping the prompt of an answer failed", exc_info=error)

    async def _prepare(self) -> list[EngineRequest]:
        self.prompts = await self.prompt_source.prompts()
        self._requests = self.generation.requests(self.prompts, self.wanted, self.salt)
        return self._requests

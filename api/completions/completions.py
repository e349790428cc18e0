"""`POST /v1/completions`: continues prompts of text or token ids, without a chat template."""

import asyncio
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from api.completions.answering import Answering, PromptSource
from api.completions.generation import EnginePrompt, Generation
from api.completions.logprobs import CompletionLogprobs
from api.completions.reply import Choice, Reply
from api.http.auth import tenant_of
from api.http.bodies import CompletionRequest
from api.http.read_body import read_json
from api.http.sse import JSONObject
from longctx.errors import InvalidRequest
from longctx.request import Segment, TokenLogprob
from longctx.text.tokenizer import Tokenizer


class CompletionFormat:
    """Writes choices and chunks as plain text."""

    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, logprobs: CompletionLogprobs | None = None) -> None:
        """`logprobs` writes them, where they were asked for."""
        self._logprobs = logprobs

    def whole(self, choice: Choice) -> JSONObject:
        told = self._written(choice.index, choice.logprobs)
        return {**self.finish(choice), "text": choice.text, "logprobs": told}

    def first_delta(self, index: int) -> JSONObject | None:
        return None

    def delta(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> JSONObject:
        told = self._written(index, logprobs) if logprobs else None
        return {"index": index, "text": text, "logprobs": told, "finish_reason": None}

    def finish(self, choice: Choice) -> JSONObject:
        return {
            "index": choice.index,
            "text": "",
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def _written(self, index: int, told: Sequence[TokenLogprob]) -> JSONObject | None:
        return None if self._logprobs is None else self._logprobs.written(index, told)


class CompletionRoutes:
    """Answers completions, of one prompt or of many."""

    def __init__(
        self, generation: Generation, tokenizer: Tokenizer, *, ping_seconds: float
    ) -> None:
        self.generation = generation
        self.tokenizer = tokenizer
        self.ping_seconds = ping_seconds

    async def create(self, request: Request) -> Response:
        """Continues one or many prompts, in one piece or as server-sent events."""
        wanted = await read_json(request, CompletionRequest)
        self.generation.check_model(wanted.model)
        prompts = LiteralPrompts(wanted, self.tokenizer, self.generation.engine.info.vocab_size)
        written = None if wanted.logprobs is None else CompletionLogprobs(self.tokenizer)
        answer = CompletionFormat(written)
        answering = Answering(self.generation, prompts, wanted, tenant_of(request))
        return await Reply(answering, answer).respond(request, ping_seconds=self.ping_seconds)


def check_vocabulary(token_ids: Sequence[int], vocab_size: int, *, param: str) -> None:
    """Raises InvalidRequest for a token id that the model does not have."""
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        raise InvalidRequest(
            f"token ids must lie in [0, {vocab_size}); these span "
            f"{min(token_ids)} to {max(token_ids)}",
            param=param,
        )


class LiteralPrompts(PromptSource):
    """Takes the prompts of a completion from its body; they wait for nothing."""

    def __init__(self, wanted: CompletionRequest, tokenizer: Tokenizer, vocab_size: int) -> None:
        super().__init__()
        self.wanted = wanted
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size

    async def prompts(self) -> list[EnginePrompt]:
        return await asyncio.to_thread(lambda: [self._prompt(one) for one in self.wanted.prompts])

    def _prompt(self, prompt: str | list[int]) -> EnginePrompt:
        if isinstance(prompt, str):
            token_ids, text = self.tokenizer.encode_completion(prompt), prompt
        else:
            token_ids, text = prompt, ""
            check_vocabulary(token_ids, self.vocab_size, param="prompt")
            text = self.tokenizer.decode(token_ids) if self.wanted.echo else ""
        segments = (Segment(token_ids=tuple(token_ids)),)
        return EnginePrompt(segments=segments, tokens=len(token_ids), text=text)

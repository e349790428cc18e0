"""`/v1beta/models`: the model in Gemini's words, and what it says next."""

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.completions.answering import Answering
from api.completions.chat import ChatRoutes
from api.completions.preamble import Preamble, SplitPrompt
from api.files.document import Document
from api.gemini.answers import EVENTS, GeminiReply, array_form
from api.gemini.bodies import ContentTokensRequest, GenerateContentRequest
from api.gemini.paging import page_of
from api.gemini.questions import chat_request
from api.http.auth import tenant_of
from api.http.bodies import ChatRequest
from api.http.errors import ApiError
from api.http.read_body import read_json
from api.http.sse import JSONObject, while_connected
from api.stored_prompts.cached_contents import CachedContent, CachedContents
from longctx.errors import InvalidRequest
from longctx.text.chat_template import Message, PromptPiece
from longctx.version import __version__

METHODS = ["generateContent", "streamGenerateContent", "countTokens", "createCachedContent"]
MOST_MODELS = 1000


@dataclass(slots=True)
class CachedPreamble(Preamble):
    """Begins with a cached content, as messages: its blocks are found like those of any prefix."""

    cached: CachedContent

    @property
    def date(self) -> str | None:
        return self.cached.record.date

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.cached.modules.id,)

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        return [*self.cached.record.messages, *messages]

    async def split(self, pieces: tuple[PromptPiece, ...]) -> SplitPrompt:
        return SplitPrompt((), pieces)


class ContentRoutes:
    """Answers Gemini's questions, by way of `ChatRoutes.ask`."""

    def __init__(self, chat: ChatRoutes, cached_contents: CachedContents) -> None:
        self.chat = chat
        self.cached_contents = cached_contents

    async def generate(self, request: Request) -> Response:
        """Answers a conversation in one piece."""
        wanted = await read_json(request, GenerateContentRequest)
        chat, answering, _ = await self._ask(request, wanted, stream=False)
        return await self._reply(chat, answering).whole(request)

    async def stream(self, request: Request) -> Response:
        """Answers a conversation as it comes: with `alt=sse` as server-sent events, else as a JSON
        array that is written element by element."""
        form = request.query_params.get("alt", "json")
        if form not in ("sse", "json"):
            raise ApiError(400, f"alt={form[:64]!r} is not known; use sse or json", param="alt")
        wanted = await read_json(request, GenerateContentRequest)
        chat, answering, _ = await self._ask(request, wanted, stream=True)
        return await self._reply(chat, answering).stream(
            EVENTS if form == "sse" else array_form(), ping_seconds=self.chat.ping_seconds
        )

    async def count(self, request: Request) -> Response:
        """Counts the tokens of contents or of a whole request. Waits until its files are read."""
        counted = await read_json(request, ContentTokensRequest)
        wanted = counted.generate_content_request
        if wanted is None:
            assert counted.contents is not None
            wanted = GenerateContentRequest(contents=counted.contents)
        _, answering, cached = await self._ask(request, wanted, stream=False)
        tokens = await while_connected(request, _tokens(answering))
        told: JSONObject = {
            "totalTokens": tokens,
            "promptTokensDetails": [{"modality": "TEXT", "tokenCount": tokens}],
        }
        if cached is not None:
            told["cachedContentTokenCount"] = cached.record.tokens
        return JSONResponse(told)

    async def models(self, request: Request) -> Response:
        """Lists the one model that is served, under all of its names."""
        names = self.chat.generation.names
        places = {name: (float(-number), name) for number, name in enumerate(names)}
        page, token = page_of(
            request, names, places.__getitem__, default=MOST_MODELS, most=MOST_MODELS
        )
        body: JSONObject = {"models": [self._model(name) for name in page]}
        return JSONResponse(body if token is None else {**body, "nextPageToken": token})

    async def model(self, request: Request) -> Response:
        """Returns the served model; 404 for any other name."""
        name = request.path_params["model"]
        self._check_model(name)
        return JSONResponse(self._model(name))

    async def _ask(
        self, request: Request, wanted: GenerateContentRequest, *, stream: bool
    ) -> tuple[ChatRequest, Answering, CachedContent | None]:
        """Returns the question as a chat and ready to be asked, and what it begins with."""
        name = request.path_params["model"]
        self._check_model(name)
        if wanted.model is not None and model_name(wanted.model) != name:
            raise InvalidRequest(
                f"model is {wanted.model[:200]!r}, and the path says {name!r}; leave it out",
                param="model",
            )
        tenant = tenant_of(request)
        cached = None
        if wanted.cached_content is not None:
            cached = self.cached_contents.find(
                tenant, cached_name(wanted.cached_content), param="cachedContent"
            )
        chat = chat_request(
            wanted,
            model=name,
            stream=stream,
            begins_with={} if cached is None else cached.record.fields,
        )
        begins: tuple[Preamble, list[Document]] | None = None
        if cached is not None:
            files = [
                self.chat.library.find(tenant, file_id, param="cachedContent")
                for file_id in cached.record.file_ids
            ]
            begins = CachedPreamble(cached), files
        return chat, await self.chat.ask(chat, tenant, begins=begins), cached

    def _reply(self, chat: ChatRequest, answering: Answering) -> GeminiReply:
        return GeminiReply(
            answering,
            self.chat.tokenizer,
            functions=[tool.name for tool in chat.offered],
            logprobs=bool(chat.logprobs),
        )

    def _check_model(self, name: str) -> None:
        names = self.chat.generation.names
        if name not in names:
            known = ", ".join(f"models/{each}" for each in names)
            raise ApiError(
                404,
                f"there is no models/{name}; this server has {known}",
                param="model",
                code="model_not_found",
            )

    def _model(self, name: str) -> JSONObject:
        limit = self.chat.generation.engine.info.max_context_tokens
        return {
            "name": f"models/{name}",
            "baseModelId": name,
            "version": __version__,
            "displayName": name,
            "description": f"{self.chat.generation.engine.info.model_name}, served by longctx",
            "inputTokenLimit": limit,
            "outputTokenLimit": limit,
            "supportedGenerationMethods": METHODS,
            "temperature": 1.0,
            "topP": 1.0,
            "topK": 0,
        }


def model_name(name: str) -> str:
    """Returns the name without the collection that Google puts before it."""
    return name.removeprefix("models/")


def cached_name(name: str) -> str:
    return name.removeprefix("cachedContents/")


async def _tokens(answering: Answering) -> int:
    async for _ in answering.prompt_source.waiting():
        pass
    return sum(prompt.tokens for prompt in await answering.prompt_source.prompts())

"""Every route of the server: path, method, endpoint and request body.

A new endpoint is a method that takes a request and returns a response, of a class in the room of
its subject, and one line here; `/openapi.json` follows.
"""

from api.anthropic.bodies import CountTokensRequest, MessagesRequest
from api.anthropic.files import AnthropicFileRoutes, by_client
from api.anthropic.routes import MessageRoutes
from api.cache_routes import CLEAR_BODY, CacheRoutes
from api.completions.attachments import Attachments
from api.completions.chat import ChatRoutes
from api.completions.completions import CompletionRoutes
from api.completions.generation import Generation
from api.completions.preamble_resolver import PreambleResolver
from api.files.routes import UPLOAD_BODY, FileRoutes
from api.gemini.bodies import (
    CachedContentRequest,
    ContentTokensRequest,
    ExpiryRequest,
    GenerateContentRequest,
)
from api.gemini.cached_routes import CachedRoutes
from api.gemini.content_routes import ContentRoutes
from api.gemini.file_routes import UPLOAD_BEGIN_BODY, UPLOAD_PIECE, GeminiFileRoutes
from api.http.bodies import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from api.http.openapi import ANYTHING, EVENTS, JSON, TEXT, Route
from api.metrics import MetricsRoute
from api.page.bench_results import BenchRoutes
from api.page.page import PageRoutes
from api.responses.bodies import InputTokensRequest, ResponseRequest
from api.responses.routes import ResponseRoutes
from api.services import Services
from api.status import EMBEDDINGS_BODY, StatusRoutes
from api.stored_prompts.prompt_routes import PromptRequest, PromptRoutes
from api.stored_prompts.schema_routes import SCHEMA_BODY, SchemaRoutes


def routes(services: Services) -> list[Route]:
    """Returns the route table, with endpoints that use `services`."""
    config, engine, documents = services.config, services.engine, services.documents
    generation = Generation(
        engine,
        config.served_name or engine.info.model_name,
        aliases=config.alias,
        tool_form=services.tokenizer.tool_form,
        metrics=services.http_metrics,
    )
    preambles = PreambleResolver(
        services.schemas,
        services.prompts,
        documents,
        engine,
        level=config.level,
        force_level=engine.config.cache.force_level,
    )
    attachments = Attachments(documents, services.folder, max_upload_bytes=config.max_upload_bytes)
    chat = ChatRoutes(
        generation,
        services.tokenizer,
        services.chat_prompts,
        documents,
        attachments,
        preambles,
        services.retention,
        ping_seconds=config.ping_seconds,
    )
    completions = CompletionRoutes(generation, services.tokenizer, ping_seconds=config.ping_seconds)
    files = FileRoutes(
        documents,
        services.folder,
        max_upload_bytes=config.max_upload_bytes,
    )
    prompts = PromptRoutes(services.prompts, engine, services.modules)
    schemas = SchemaRoutes(services.schemas, engine, services.modules)
    responses = ResponseRoutes(chat, services.responses, ping_seconds=config.ping_seconds)
    named = AnthropicFileRoutes(files)
    messages = MessageRoutes(chat, ping_seconds=config.ping_seconds)
    status = StatusRoutes(generation, services.tokenizer, chat)
    cache = CacheRoutes(engine, documents)
    bench = BenchRoutes(services.folder)
    metrics = MetricsRoute(engine, documents, services.http_metrics)
    gemini = ContentRoutes(chat, services.cached_contents)
    cached = CachedRoutes(chat, attachments, services.cached_contents)
    gemini_files = GeminiFileRoutes(files, services.uploads)
    found = [
        Route("GET", "/health", status.health),
        Route("GET", "/metrics", metrics.scrape, answers=(TEXT,)),
        Route("GET", "/v1/cache", cache.retrieve),
        Route("POST", "/v1/cache/flush", cache.clear, CLEAR_BODY),
        Route("GET", "/v1/bench/niah", bench.niah),
        Route("GET", "/v1/models", status.models),
        Route("GET", "/v1/models/{name:path}", status.model),
        Route("GET", "/v1/scheduler", status.scheduler),
        Route("POST", "/tokenize", status.tokenize, TokenizeRequest),
        Route("POST", "/detokenize", status.detokenize, DetokenizeRequest),
        Route("POST", "/v1/embeddings", status.embeddings, EMBEDDINGS_BODY),
        Route("POST", "/v1/chat/completions", chat.create, ChatRequest),
        Route("POST", "/v1/completions", completions.create, CompletionRequest),
        Route("POST", "/v1/responses", responses.create, ResponseRequest),
        Route("POST", "/v1/responses/input_tokens", responses.input_tokens, InputTokensRequest),
        Route("GET", "/v1/responses/{response_id}", responses.retrieve),
        Route("DELETE", "/v1/responses/{response_id}", responses.delete),
        Route("GET", "/v1/responses/{response_id}/input_items", responses.input_items),
        Route("POST", "/v1/messages", messages.create, MessagesRequest),
        Route("POST", "/v1/messages/count_tokens", messages.count_tokens, CountTokensRequest),
        Route("POST", "/v1/prompt_cache/prompts", prompts.create, PromptRequest),
        Route("GET", "/v1/prompt_cache/prompts", prompts.list),
        Route("GET", "/v1/prompt_cache/prompts/{name}", prompts.retrieve),
        Route("DELETE", "/v1/prompt_cache/prompts/{name}", prompts.delete),
        Route("POST", "/v1/prompt_cache/schemas", schemas.create, SCHEMA_BODY),
        Route("GET", "/v1/prompt_cache/schemas", schemas.list),
        Route("GET", "/v1/prompt_cache/schemas/{name}", schemas.retrieve),
        Route("DELETE", "/v1/prompt_cache/schemas/{name}", schemas.delete),
        Route("POST", "/v1/files", by_client(files.create, named.create), UPLOAD_BODY),
        Route("GET", "/v1/files", by_client(files.list, named.list)),
        Route("GET", "/v1/files/{file_id}", by_client(files.retrieve, named.retrieve)),
        Route("GET", "/v1/files/{file_id}/content", files.content, answers=(ANYTHING,)),
        Route("GET", "/v1/files/{file_id}/text", files.text, answers=(TEXT,)),
        Route("GET", "/v1/files/{file_id}/sections", files.sections),
        Route("DELETE", "/v1/files/{file_id}", by_client(files.delete, named.delete)),
        Route(
            "POST",
            "/v1beta/models/{model:path}:generateContent",
            gemini.generate,
            GenerateContentRequest,
        ),
        Route(
            "POST",
            "/v1beta/models/{model:path}:streamGenerateContent",
            gemini.stream,
            GenerateContentRequest,
            answers=(JSON, EVENTS),
        ),
        Route(
            "POST", "/v1beta/models/{model:path}:countTokens", gemini.count, ContentTokensRequest
        ),
        Route("GET", "/v1beta/models", gemini.models),
        Route("GET", "/v1beta/models/{model:path}", gemini.model),
        Route("POST", "/v1beta/cachedContents", cached.create, CachedContentRequest),
        Route("GET", "/v1beta/cachedContents", cached.page),
        Route("GET", "/v1beta/cachedContents/{name}", cached.retrieve),
        Route("PATCH", "/v1beta/cachedContents/{name}", cached.update, ExpiryRequest),
        Route("DELETE", "/v1beta/cachedContents/{name}", cached.delete),
        Route("POST", "/upload/v1beta/files", gemini_files.begin, UPLOAD_BEGIN_BODY),
        Route("POST", "/upload/v1beta/sessions/{upload_id}", gemini_files.go_on, UPLOAD_PIECE),
        Route("GET", "/v1beta/files", gemini_files.list),
        Route("GET", "/v1beta/files/{name}", gemini_files.retrieve),
        Route("DELETE", "/v1beta/files/{name}", gemini_files.delete),
    ]
    if config.page:
        page = PageRoutes()
        found += [
            Route("GET", "/", page.index, answers=("text/html",)),
            Route("GET", "/page/{name}", page.file, answers=(ANYTHING,)),
        ]
    return found

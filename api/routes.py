"""Every route of the server: path, method, endpoint and request body.

A new endpoint is a method that takes a request and returns a response, of a class in the room of
its subject, and one line here; `/openapi.json` follows.
"""

from api.cache_routes import FLUSH_BODY, Cache
from api.completions.attachments import Attachments
from api.completions.chat import Chat
from api.completions.completions import Completions
from api.completions.generation import Generation
from api.completions.preamble_resolver import Openings
from api.files.routes import UPLOAD_BODY, Files
from api.http.bodies import ChatRequest, CompletionRequest, TokenizeRequest
from api.http.openapi import Route
from api.metrics import Metrics
from api.services import Services
from api.status import About
from api.stored_prompts.prompt_routes import PromptRequest, Prompts
from api.stored_prompts.schema_routes import SCHEMA_BODY, Schemas


def routes(services: Services) -> list[Route]:
    """The route table, with endpoints that use `services`."""
    config, engine, documents = services.config, services.engine, services.documents
    generation = Generation(
        engine,
        config.served_name or engine.info.model_name,
        on_first_token=services.http_metrics.first_token_seconds.observe,
    )
    openings = Openings(
        services.schemas,
        services.prompts,
        documents,
        engine,
        level=config.level,
        force_level=engine.config.cache.force_level,
    )
    attachments = Attachments(documents, services.folder, max_upload_bytes=config.max_upload_bytes)
    chat = Chat(
        generation,
        services.chat_prompts,
        documents,
        attachments,
        openings,
        services.retention,
        ping_seconds=config.ping_seconds,
    )
    completions = Completions(generation, services.tokenizer, ping_seconds=config.ping_seconds)
    files = Files(
        documents,
        services.folder,
        forget=(services.prompts.forget_file, services.retention.forget_file),
        max_upload_bytes=config.max_upload_bytes,
    )
    prompts = Prompts(services.prompts, engine, services.modules)
    schemas = Schemas(services.schemas, engine, services.modules)
    about = About(generation, services.tokenizer, chat)
    cache = Cache(engine, documents)
    metrics = Metrics(engine, documents, services.http_metrics)
    return [
        Route("GET", "/health", about.health),
        Route("GET", "/metrics", metrics.scrape),
        Route("GET", "/v1/cache", cache.retrieve),
        Route("POST", "/v1/cache/flush", cache.flush, FLUSH_BODY),
        Route("GET", "/v1/models", about.models),
        Route("GET", "/v1/models/{name:path}", about.model),
        Route("POST", "/tokenize", about.tokenize, TokenizeRequest),
        Route("POST", "/v1/chat/completions", chat.create, ChatRequest),
        Route("POST", "/v1/completions", completions.create, CompletionRequest),
        Route("POST", "/v1/prompt_cache/prompts", prompts.create, PromptRequest),
        Route("GET", "/v1/prompt_cache/prompts", prompts.list),
        Route("GET", "/v1/prompt_cache/prompts/{name}", prompts.retrieve),
        Route("DELETE", "/v1/prompt_cache/prompts/{name}", prompts.delete),
        Route("POST", "/v1/prompt_cache/schemas", schemas.create, SCHEMA_BODY),
        Route("GET", "/v1/prompt_cache/schemas", schemas.list),
        Route("GET", "/v1/prompt_cache/schemas/{name}", schemas.retrieve),
        Route("DELETE", "/v1/prompt_cache/schemas/{name}", schemas.delete),
        Route("POST", "/v1/files", files.create, UPLOAD_BODY),
        Route("GET", "/v1/files", files.list),
        Route("GET", "/v1/files/{file_id}", files.retrieve),
        Route("GET", "/v1/files/{file_id}/content", files.content),
        Route("DELETE", "/v1/files/{file_id}", files.delete),
    ]

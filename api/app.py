"""The application: what stands behind the routes, started and ended in order, and every route."""

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI

from api.background.store_dir import StoreDir
from api.cache_routes import Cache
from api.completions.attachments import Attachments
from api.completions.chat import Chat
from api.completions.completions import Completions
from api.completions.generation import Generation
from api.completions.preamble_resolver import Openings
from api.config import ServerConfig
from api.files.document_library import Library
from api.files.document_store import DocumentStore
from api.files.routes import Files
from api.files.tokenizer_process import Parser
from api.http.auth import Authentication
from api.http.bodies import ChatRequest, CompletionRequest, FlushRequest, TokenizeRequest
from api.http.errors import HANDLERS
from api.http.openapi import body_of, describe_bodies
from api.metrics import HTTPMetrics, Measured, Metrics
from api.status import About
from api.stored_prompts.module_keeper import Keeper
from api.stored_prompts.prompt_library import PromptLibrary
from api.stored_prompts.prompt_routes import PromptRequest, Prompts
from api.stored_prompts.records import PromptRecords
from api.stored_prompts.retention import Retention
from api.stored_prompts.schema_library import SchemaLibrary
from api.stored_prompts.schema_routes import Schemas
from longctx.config import EngineConfig
from longctx.process.client import EngineClient
from longctx.text.chat_template import ChatPrompts
from longctx.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Application:
    asgi: FastAPI
    engine: EngineClient
    library: Library


@asynccontextmanager
async def open_application(
    engine_config: EngineConfig,
    config: ServerConfig,
    *,
    keys: tuple[str, ...],
    folder: StoreDir,
    tokenizer: Tokenizer,
    parser: Parser,
) -> AsyncGenerator[Application, None]:
    """Starts the engine, then takes up the documents. Raises LongctxError.

    `parser` is ended with it: it is made by the caller because it must be made before threads.
    """
    async with AsyncExitStack() as stack:
        stack.push_async_callback(parser.close)
        engine = EngineClient(engine_config, cache_dir=folder.models)
        stack.push_async_callback(engine.drain, 0)
        info = await engine.start()
        store = DocumentStore(folder.database)
        stack.push_async_callback(store.close)
        await store.open()
        prompts = ChatPrompts(tokenizer)
        library = Library(folder, store, parser, prompts, engine)
        stack.push_async_callback(library.close)
        await library.open()
        records = PromptRecords(folder.prompts_database)
        stack.push_async_callback(records.close)
        await records.open()
        keeper = Keeper(engine)
        stack.push_async_callback(keeper.close)
        schemas = SchemaLibrary(records, tokenizer, prompts, engine, keeper)
        await schemas.open()
        named = PromptLibrary(records, library, folder, prompts, keeper)
        stack.push_async_callback(named.close)
        await named.open()
        retention = Retention(records, folder, engine, keeper)
        stack.push_async_callback(retention.close)
        await retention.open()

        async def reopen() -> None:
            await library.reopen()
            await keeper.reopen()

        engine.on_restart = reopen
        measured = HTTPMetrics()
        generation = Generation(
            engine,
            config.served_name or info.model_name,
            on_first_token=measured.first_token_seconds.observe,
        )
        asgi = _routes(
            *(config, generation, tokenizer, prompts, library, schemas, named, retention, keeper),
            *(folder, measured),
        )
        asgi.add_middleware(Authentication, keys=keys, secret=folder.secret())
        asgi.add_middleware(Measured, metrics=measured)  # the last is the outermost
        yield Application(asgi, engine, library)


def _routes(
    config: ServerConfig,
    generation: Generation,
    tokenizer: Tokenizer,
    prompts: ChatPrompts,
    library: Library,
    schema_library: SchemaLibrary,
    prompt_library: PromptLibrary,
    retention: Retention,
    keeper: Keeper,
    folder: StoreDir,
    measured: HTTPMetrics,
) -> FastAPI:
    limit = config.max_upload_bytes
    attachments = Attachments(library, folder, max_upload_bytes=limit)
    engine = generation.engine
    openings = Openings(
        schema_library,
        prompt_library,
        library,
        engine,
        level=config.level,
        force_level=engine.config.cache.force_level,
    )
    pings = config.ping_seconds
    chat = Chat(generation, prompts, library, attachments, openings, retention, ping_seconds=pings)
    completions = Completions(generation, tokenizer, ping_seconds=config.ping_seconds)
    forget = (prompt_library.forget_file, retention.forget_file)
    files = Files(library, folder, forget, max_upload_bytes=limit)
    about = About(generation, tokenizer, chat)
    metrics = Metrics(engine, library, measured)
    cache = Cache(engine, library)
    named = Prompts(prompt_library, engine, keeper)
    schemas = Schemas(schema_library, engine, keeper)
    app = FastAPI(title="longctx", exception_handlers=HANDLERS)
    describe_bodies(app)
    for method, path, answer, body in (
        ("GET", "/health", about.health, None),
        ("GET", "/metrics", metrics.scrape, None),
        ("GET", "/v1/cache", cache.retrieve, None),
        ("POST", "/v1/cache/flush", cache.flush, FlushRequest),
        ("GET", "/v1/models", about.models, None),
        ("GET", "/v1/models/{name:path}", about.model, None),
        ("POST", "/tokenize", about.tokenize, TokenizeRequest),
        ("POST", "/v1/chat/completions", chat.create, ChatRequest),
        ("POST", "/v1/completions", completions.create, CompletionRequest),
        ("POST", "/v1/prompt_cache/prompts", named.create, PromptRequest),
        ("GET", "/v1/prompt_cache/prompts", named.list, None),
        ("GET", "/v1/prompt_cache/prompts/{name}", named.retrieve, None),
        ("DELETE", "/v1/prompt_cache/prompts/{name}", named.delete, None),
        ("POST", "/v1/prompt_cache/schemas", schemas.create, None),
        ("GET", "/v1/prompt_cache/schemas", schemas.list, None),
        ("GET", "/v1/prompt_cache/schemas/{name}", schemas.retrieve, None),
        ("DELETE", "/v1/prompt_cache/schemas/{name}", schemas.delete, None),
        ("POST", "/v1/files", files.create, None),
        ("GET", "/v1/files", files.list, None),
        ("GET", "/v1/files/{file_id}", files.retrieve, None),
        ("GET", "/v1/files/{file_id}/content", files.content, None),
        ("DELETE", "/v1/files/{file_id}", files.delete, None),
    ):
        app.add_api_route(
            path, answer, methods=[method], openapi_extra=None if body is None else body_of(body)
        )
    return app

"""The application: what stands behind the routes, started and ended in order, and every route."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI

from api.about import About
from api.attachments import Attachments
from api.auth import Authentication, read_keys
from api.chat import Chat
from api.completions import Completions
from api.config import ServerConfig
from api.documents import DocumentStore
from api.errors import HANDLERS
from api.files import Files
from api.generation import Generation
from api.library import Library
from api.parser import Parser
from api.store_dir import StoreDir
from longctx.client import EngineClient
from longctx.config import EngineConfig
from longctx.prompt import ChatPrompts
from longctx.tokenizer import Tokenizer


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
    folder: StoreDir,
    tokenizer: Tokenizer,
    parser: Parser,
) -> AsyncGenerator[Application, None]:
    """Starts the engine, then takes up the documents. Raises LongctxError.

    `parser` is ended with it: it is made by the caller because it must be made before threads.
    """
    keys = read_keys(config)
    engine = EngineClient(engine_config)
    store = DocumentStore(folder.database)
    prompts = ChatPrompts(tokenizer)
    library = Library(folder, store, parser, prompts, engine)
    try:
        info = await engine.start()
        await store.open()
        await library.open()
        engine.on_restart = library.reopen
        generation = Generation(engine, config.served_name or info.model_name)
        asgi = _routes(config, generation, tokenizer, prompts, library, folder)
        asgi.add_middleware(Authentication, keys=keys, secret=folder.secret())
        yield Application(asgi, engine, library)
    finally:
        await library.close()
        await engine.drain(0)
        await store.close()
        await parser.close()


def _routes(
    config: ServerConfig,
    generation: Generation,
    tokenizer: Tokenizer,
    prompts: ChatPrompts,
    library: Library,
    folder: StoreDir,
) -> FastAPI:
    limit = config.max_upload_bytes
    attachments = Attachments(library, folder, max_upload_bytes=limit)
    chat = Chat(generation, prompts, library, attachments, ping_seconds=config.ping_seconds)
    completions = Completions(generation, tokenizer, ping_seconds=config.ping_seconds)
    files = Files(library, folder, max_upload_bytes=limit)
    about = About(generation, tokenizer, chat)
    app = FastAPI(title="longctx", exception_handlers=HANDLERS)
    for method, path, answer in (
        ("GET", "/health", about.health),
        ("GET", "/v1/models", about.models),
        ("GET", "/v1/models/{name:path}", about.model),
        ("POST", "/tokenize", about.tokenize),
        ("POST", "/v1/chat/completions", chat.create),
        ("POST", "/v1/completions", completions.create),
        ("POST", "/v1/files", files.create),
        ("GET", "/v1/files", files.list),
        ("GET", "/v1/files/{file_id}", files.retrieve),
        ("GET", "/v1/files/{file_id}/content", files.content),
        ("DELETE", "/v1/files/{file_id}", files.delete),
    ):
        app.add_api_route(path, answer, methods=[method])
    return app

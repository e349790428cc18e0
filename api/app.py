"""The ASGI application: the route table behind authentication and request metrics."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware

from api.background.store_dir import StoreDir
from api.config import ServerConfig
from api.files.document_library import DocumentLibrary
from api.files.tokenizer_process import TokenizerProcess
from api.gemini.versions import GeminiVersions
from api.http.auth import OPEN_PATHS, Authentication
from api.http.foreign_pages import ForeignPages
from api.http.observing import Observer, Observing
from api.http.openapi import serve_routes
from api.http.refusals import HANDLERS
from api.metrics import MetricsMiddleware
from api.page.page import page_paths
from api.routes import routes
from api.services import Services, open_services
from longctx.config import EngineConfig
from longctx.process.client import EngineClient
from longctx.process.launcher import EngineProcesses
from longctx.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Application:
    """Holds what the server needs to answer requests, and to end in order."""

    asgi: Starlette
    engine: EngineClient
    library: DocumentLibrary


@asynccontextmanager
async def open_application(
    engine_config: EngineConfig,
    config: ServerConfig,
    *,
    keys: tuple[str, ...],
    folder: StoreDir,
    tokenizer: Tokenizer,
    tokenizer_process: TokenizerProcess,
    processes: EngineProcesses | None = None,
    observers: Sequence[Observer] = (),
) -> AsyncGenerator[Application, None]:
    """Opens the services and the application in front of them. Raises LongctxError.

    `keys`: the accepted API keys; without any, every request is accepted. `processes`: where the
    engine was launched already. `observers` are told of every request. The tokenizer process is
    ended too.
    """
    async with open_services(
        engine_config,
        config,
        folder=folder,
        tokenizer=tokenizer,
        tokenizer_process=tokenizer_process,
        processes=processes,
    ) as services:
        asgi = make_asgi(services)
        asgi.add_middleware(
            Authentication,
            keys=keys,
            secret=folder.secret(),
            open_paths=OPEN_PATHS | (page_paths() if config.page else frozenset()),
        )
        asgi.add_middleware(ForeignPages, allowed=config.cors_origin)
        if config.cors_origin:  # before keys are asked for: browsers ask first, without one
            asgi.add_middleware(
                CORSMiddleware,
                allow_origins=config.cors_origin,
                allow_methods=["*"],
                allow_headers=["*"],
            )
        # The last ones added are the outermost: refused requests are counted too.
        asgi.add_middleware(MetricsMiddleware, metrics=services.http_metrics)
        if observers:
            asgi.add_middleware(Observing, observers=observers)
        asgi.add_middleware(GeminiVersions)
        yield Application(asgi, services.engine, services.documents)


def make_asgi(services: Services) -> Starlette:
    """Makes the ASGI application of the routes and error answers, without middleware."""
    return Starlette(routes=serve_routes(routes(services)), exception_handlers=HANDLERS)

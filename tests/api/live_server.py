"""A server for tests: the real application on a real socket, run by a thread of this process."""

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Self, TypeVar
from unittest import mock

import httpx
import openai

from api.app import open_application
from api.background.store_dir import StoreDir
from api.config import ServerConfig
from api.files.tokenizer_process import TokenizerProcess
from api.http.auth import read_keys
from api.http.observing import Observer
from api.http_server import Server
from api.listener import listen
from longctx.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from longctx.engine_stats import EngineStats
from longctx.text.tokenizer import Tokenizer
from tests.support.waiting import patient

Result = TypeVar("Result")

MODEL = "tiny"


def start_tokenizer_process(tokenizer: Tokenizer) -> TokenizerProcess:
    """The server's, at an ordinary priority: at its own it gets no time on a busy machine."""
    with mock.patch("api.files.tokenizer_process.leave_processors_to_others"):
        return TokenizerProcess(tokenizer)


class LiveServer:
    def __init__(
        self,
        model_folder: Path,
        store_dir: Path,
        *,
        max_sequences: int = 64,
        cache: dict[str, Any] | None = None,
        observers: Sequence[Observer] = (),
        **settings: Any,
    ) -> None:
        """`cache` and `settings`: fields of `CacheConfig` and `ServerConfig`."""
        self.engine_config = EngineConfig(
            model=ModelConfig(model=model_folder, device="cpu", threads=1),
            cache=CacheConfig(**{"kv_codec": "raw", "device_pool_gib": 0.1, **(cache or {})}),
            scheduler=SchedulerConfig(max_batch_tokens=512, max_sequences=max_sequences),
        )
        self.config = ServerConfig(
            **{
                "port": 0,
                "store_dir": store_dir,
                "served_name": MODEL,
                "ping_seconds": 0.2,
                "drain_seconds": 1.0,
                "max_upload_mib": 8,
                **settings,
            }
        )
        self.observers = observers
        self.tokenizer = Tokenizer(model_folder)
        self.started = threading.Event()
        self.failure: BaseException | None = None

    def __enter__(self) -> Self:
        self.tokenizer_process = start_tokenizer_process(self.tokenizer)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        self.started.wait()
        if self.failure is not None:
            self.thread.join()
            raise self.failure
        self.http = httpx.Client(base_url=self.url, timeout=patient())
        return self

    def __exit__(self, *exception: object) -> None:
        self.http.close()
        self.server.should_exit = True
        self.thread.join(patient())
        assert not self.thread.is_alive(), "the server did not stop"

    @property
    def documents(self) -> Path:
        return self.config.folder / "documents"

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=patient()
        )

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Runs a coroutine on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(patient())

    def engine_stats(self) -> EngineStats:
        return self.call(self.application.engine.stats())

    def _run(self) -> None:
        try:
            with (
                closing(listen(self.config)) as listener,
                closing(StoreDir(self.config.folder)) as folder,
            ):
                host, port = listener.getsockname()
                self.url = f"http://{host}:{port}"
                asyncio.run(self._serve(listener, folder))
        except BaseException as failure:
            self.failure = failure
            self.started.set()

    async def _serve(self, listener: Any, folder: StoreDir) -> None:
        self.loop = asyncio.get_running_loop()
        async with open_application(
            self.engine_config,
            self.config,
            keys=read_keys(self.config),
            folder=folder,
            tokenizer=self.tokenizer,
            tokenizer_process=self.tokenizer_process,
            observers=self.observers,
        ) as self.application:
            self.server = Server(self.application, self.config)
            self.started.set()
            await self.server.serve([listener])

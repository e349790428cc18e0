"""Starts what the endpoints use in order, and ends it in the opposite order."""

import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from api.background.store_dir import StoreDir
from api.config import ServerConfig
from api.files.document_library import DocumentLibrary
from api.files.document_store import DocumentStore
from api.files.resumable import ResumableUploads
from api.files.tokenizer_process import TokenizerProcess
from api.metrics import HTTPMetrics
from api.stored_prompts.cached_contents import CachedContents
from api.stored_prompts.module_keeper import ModuleKeeper
from api.stored_prompts.prompt_library import PromptLibrary
from api.stored_prompts.records import PromptRecords
from api.stored_prompts.retention import Retention
from api.stored_prompts.schema_library import SchemaLibrary
from api.stored_responses.library import StoredResponses
from api.stored_responses.records import ResponseRecords
from longctx.config import EngineConfig
from longctx.process.client import EngineClient
from longctx.process.launcher import EngineProcesses
from longctx.text.chat_template import ChatPrompts
from longctx.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Holds everything that endpoints use. All of it belongs to the server's event loop."""

    config: ServerConfig
    folder: StoreDir
    tokenizer: Tokenizer
    chat_prompts: ChatPrompts
    engine: EngineClient
    documents: DocumentLibrary
    modules: ModuleKeeper
    schemas: SchemaLibrary
    prompts: PromptLibrary
    retention: Retention
    responses: StoredResponses
    cached_contents: CachedContents
    uploads: ResumableUploads
    http_metrics: HTTPMetrics


@asynccontextmanager
async def open_services(
    engine_config: EngineConfig,
    config: ServerConfig,
    *,
    folder: StoreDir,
    tokenizer: Tokenizer,
    tokenizer_process: TokenizerProcess,
    processes: EngineProcesses | None = None,
) -> AsyncGenerator[Services, None]:
    """Starts the engine, then takes up documents, schemas and prompts. Raises LongctxError.

    The tokenizer process is ended too; the caller makes it, because it must be made before there
    are threads. `processes`: where the engine was launched already.
    """
    async with AsyncExitStack() as stack:
        stack.push_async_callback(tokenizer_process.close)
        engine = EngineClient(engine_config, cache_dir=folder.models, processes=processes)
        stack.push_async_callback(engine.drain, 0)
        engine.on_loading = lambda step: print(f"longctx is {step}", file=sys.stderr)
        await engine.start()
        store = DocumentStore(folder.database)
        stack.push_async_callback(store.close)
        await store.open()
        chat_prompts = ChatPrompts(tokenizer)
        documents = DocumentLibrary(folder, store, tokenizer_process, chat_prompts, engine)
        stack.push_async_callback(documents.close)
        await documents.open()
        records = PromptRecords(folder.prompts_database)
        stack.push_async_callback(records.close)
        await records.open()
        modules = ModuleKeeper(engine, records)
        stack.push_async_callback(modules.close)
        schemas = SchemaLibrary(records, tokenizer, chat_prompts, engine, modules)
        await schemas.open()
        prompts = PromptLibrary(records, documents, folder, chat_prompts, modules)
        stack.push_async_callback(prompts.close)
        await prompts.open()
        retention = Retention(records, folder, engine, modules)
        stack.push_async_callback(retention.close)
        await retention.open()
        response_records = ResponseRecords(folder.responses_database)
        stack.push_async_callback(response_records.close)
        await response_records.open()
        responses = StoredResponses(response_records, engine, forget=(retention.forget_file,))
        stack.push_async_callback(responses.close)
        await responses.open()
        cached_contents = CachedContents(records, documents, folder, chat_prompts, modules)
        stack.push_async_callback(cached_contents.close)
        documents.start_expiry(
            prompts.forget_file, retention.forget_file, cached_contents.forget_file
        )
        stack.push_async_callback(documents.stop_expiry)
        await cached_contents.open()
        uploads = ResumableUploads(folder, max_upload_bytes=config.max_upload_bytes)
        stack.push_async_callback(uploads.close)
        uploads.open()

        async def reopen() -> None:
            await documents.reopen()
            await modules.reopen()
            await responses.reopen()

        engine.on_restart = reopen
        await modules.drop_unknown()
        yield Services(
            config=config,
            folder=folder,
            tokenizer=tokenizer,
            chat_prompts=chat_prompts,
            engine=engine,
            documents=documents,
            modules=modules,
            schemas=schemas,
            prompts=prompts,
            retention=retention,
            responses=responses,
            cached_contents=cached_contents,
            uploads=uploads,
            http_metrics=HTTPMetrics(
                prefix=config.metrics_prefix, model=config.served_name or engine.info.model_name
            ),
        )

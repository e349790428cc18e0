"""`longctx serve`: starts everything in order.

First what a mistake shows at once: keys, port, folder. Then the engine's process, which imports
torch and loads its model while this one imports the HTTP server; then the tokenizer process is
forked, while there are no threads; then the documents, then the ready line.
"""

import contextlib
import importlib
import signal
from pathlib import Path

from api.background.store_dir import StoreDir
from api.config import ServerConfig
from api.http.auth import read_keys
from api.listener import listen, raise_descriptor_limit
from longctx.config import EngineConfig
from longctx.process.launcher import engine_processes
from longctx.process.quick_import import interruptible, uncollected


def serve(engine_config: EngineConfig, model_folder: Path, config: ServerConfig) -> None:
    """Serve until SIGTERM or Ctrl-C. Call it from the main thread, before there are others.

    Raises LongctxError when it cannot start, KeyboardInterrupt or asyncio.CancelledError when it
    is told to stop before it is ready.
    """
    keys = read_keys(config)
    raise_descriptor_limit()  # the engine's process inherits it, for the files of its tier
    with (
        contextlib.closing(listen(config)) as listener,
        contextlib.closing(StoreDir(config.folder)) as folder,
        contextlib.ExitStack() as stack,
    ):
        processes = engine_processes(engine_config, folder.models)
        stack.callback(processes.kill)
        # Until the event loop takes signals over, one that ends this process ends the engine too
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        stack.callback(signal.signal, signal.SIGTERM, before)
        with contextlib.suppress(OSError):  # `open` tries again, and says why it fails
            processes.launch()
        with interruptible(processes.kill), uncollected():
            http_server = importlib.import_module("api.http_server")
        http_server.run(
            engine_config,
            model_folder,
            config,
            keys=keys,
            listener=listener,
            folder=folder,
            processes=processes,
        )

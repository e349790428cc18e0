"""`longctx serve`: the server with its KV blocks and its secret in the store's folder."""

import argparse
import asyncio
from dataclasses import replace

from api.config import ServerConfig
from api.server import serve
from longctx.commands.arguments import read_config, read_engine_config


def run(arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises LongctxError where the server cannot start."""
    engine, folder = read_engine_config(arguments)
    server = read_config(arguments, ServerConfig)
    if engine.cache.kv_dir is None:
        engine = replace(engine, cache=replace(engine.cache, kv_dir=server.folder / "kv"))
    if engine.ring.head_secret is None:
        secret = server.folder / "ring-secret"
        engine = replace(engine, ring=replace(engine.ring, head_secret=secret))
    try:
        serve(engine, folder, server)
    except asyncio.CancelledError:  # told to stop before it was ready
        raise KeyboardInterrupt from None

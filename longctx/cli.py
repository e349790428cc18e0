"""The command line: `longctx COMMAND`. A command is an entry of COMMANDS.

Every failure that has a cause outside of us ends in one line on stderr and status 1.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from api.config import ServerConfig
from api.server import serve
from longctx.bench import BENCHES
from longctx.commands.ask import ask
from longctx.commands.bench import bench_arguments, run_bench
from longctx.commands.cache import BOUNDS, cache_arguments, run_cache
from longctx.commands.prompt_cache import prompt_cache_arguments, run_prompt_cache
from longctx.config import EngineConfig
from longctx.embedded import model_path
from longctx.errors import LongctxError
from longctx.options import add_options, read_options

# The environment and a TOML file may have the options of any command.
CONFIGS = (
    EngineConfig,
    ServerConfig,
    *(tree for each in BENCHES.values() for tree in each.configs),
)
OF_CONTEXT = ("model", "max_context", "force_context", "rope_override")  # how long it may be

Config = TypeVar("Config")


@dataclass(frozen=True, slots=True)
class Command:
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, EngineConfig)
    add_options(parser, ServerConfig)


def _serve(arguments: argparse.Namespace) -> None:
    engine, folder = _engine(arguments)
    server = _read(arguments, ServerConfig)
    if engine.cache.kv_dir is None:
        engine = replace(engine, cache=replace(engine.cache, kv_dir=server.folder / "kv"))
    if engine.ring.head_secret is None:
        secret = server.folder / "ring-secret"
        engine = replace(engine, ring=replace(engine.ring, head_secret=secret))
    serve(engine, folder, server)


def _ask_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="UTF-8 text or Markdown")
    parser.add_argument("question")
    add_options(parser, EngineConfig)


def _ask(arguments: argparse.Namespace) -> None:
    ask(*_engine(arguments), arguments.file, arguments.question)


def _bench(arguments: argparse.Namespace) -> None:
    trees = BENCHES[arguments.bench].configs
    configs: list[object] = [_read(arguments, tree) for tree in trees]
    run_bench(arguments.bench, configs, arguments.words)


def _cache_arguments(parser: argparse.ArgumentParser) -> None:
    for action, subparser in cache_arguments(parser).items():
        add_options(subparser, ServerConfig, only=("store_dir",))
        add_options(subparser, EngineConfig, only=("kv_dir", *BOUNDS.get(action, ())))


def _cache(arguments: argparse.Namespace) -> None:
    cache = _read(arguments, EngineConfig).cache
    run_cache(arguments, cache.kv_dir or _read(arguments, ServerConfig).folder / "kv", cache)


def _prompt_cache_arguments(parser: argparse.ArgumentParser) -> None:
    for subparser in prompt_cache_arguments(parser).values():
        add_options(subparser, EngineConfig, only=OF_CONTEXT)


def _prompt_cache(arguments: argparse.Namespace) -> None:
    engine, folder = _engine(arguments)
    run_prompt_cache(arguments, engine.model, folder)


COMMANDS = {
    "serve": Command("serve a model over HTTP", _serve_arguments, _serve),
    "ask": Command("ask a question about a file, without a server", _ask_arguments, _ask),
    "cache": Command(
        "see and tidy what is stored below the device; see cache --help", _cache_arguments, _cache
    ),
    "prompt-cache": Command(
        "check prompt schemas; see prompt-cache --help", _prompt_cache_arguments, _prompt_cache
    ),
    "bench": Command("measure quality and speed; see bench --help", bench_arguments, _bench),
}


def main(words: Sequence[str] | None = None) -> None:
    """Runs one command. Ends by SystemExit when it fails."""
    parser = argparse.ArgumentParser(
        prog="longctx",
        description="Upload a long document once, ask it anything for the price of the question.",
    )
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    words = sys.argv[1:] if words is None else words
    arguments = parser.parse_args(words, argparse.Namespace(words=words))
    try:
        arguments.run(arguments)
    except LongctxError as error:
        raise SystemExit(f"longctx: {error}") from error
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise SystemExit(130) from None


def _read(arguments: argparse.Namespace, config_type: type[Config]) -> Config:
    return read_options(
        arguments, config_type, environment=os.environ, file=arguments.config, others=CONFIGS
    )


def _engine(arguments: argparse.Namespace) -> tuple[EngineConfig, Path]:
    """The engine's configuration, and the model folder: the embedded one if none was named."""
    config = _read(arguments, EngineConfig)
    folder = config.model.model or model_path()
    return replace(config, model=replace(config.model, model=folder)), folder

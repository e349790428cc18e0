"""The arguments of every command, and the configurations that they give.

`longctx --help` loads this and no more: nothing here imports what a command runs.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from api.config import ServerConfig
from longctx.bench import BENCHES
from longctx.config import EngineConfig
from longctx.errors import LongctxError
from longctx.model.named import find_model
from longctx.options import add_options, is_unicode, read_options

# The environment and a TOML file may have the options of any command.
CONFIGS = (
    EngineConfig,
    ServerConfig,
    *(tree for each in BENCHES.values() for tree in each.configs),
)
CONTEXT_OPTIONS = ("model", "max_context", "force_context", "rope_override")
BOUND_OPTIONS = ("disk_cap_gib", "disk_free_gib", "disk_ttl_days")
CACHE_ACTIONS = {
    "ls": "list what is stored, by namespace: model, codec and tenant",
    "rm": "delete namespaces, or extents with all that follows them",
    "verify": "read and check every byte; put aside what is not as it was written",
    "gc": "delete what is too old or over the bounds, and what crashes have left",
}
PROMPT_CACHE_ACTIONS = {"check": "check a prompt schema, and show where its modules stand"}
FORMATS = "text, Markdown, CSV, HTML, PDF, Word (.docx), EPUB, .zip, .tar.gz"

Config = TypeVar("Config")


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every option of the engine and of the server."""
    add_options(parser, EngineConfig)
    add_options(parser, ServerConfig)


def ask_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files, the question and every option of the engine."""
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help=f"{FORMATS}; - is stdin"
    )
    parser.add_argument("question")
    add_options(parser, EngineConfig)


def chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files and every option of the engine."""
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help=FORMATS)
    add_options(parser, EngineConfig)


def models_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command takes no options."""


def cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand for each action on the disk tier; `action` is its name."""
    actions = _actions(parser, CACHE_ACTIONS)
    actions["ls"].add_argument("--extents", action="store_true", help="a line for each extent")
    actions["rm"].add_argument(
        "names", nargs="*", metavar="NAME", help="how a namespace or extent begins, as ls shows it"
    )
    actions["rm"].add_argument("--all", action="store_true", help="delete everything")
    for name, action in actions.items():
        add_options(action, ServerConfig, only=("store_dir",))
        bounds = BOUND_OPTIONS if name == "gc" else ()
        add_options(action, EngineConfig, only=("kv_dir", *bounds))


def prompt_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand for each action on a schema; `action` is its name."""
    actions = _actions(parser, PROMPT_CACHE_ACTIONS)
    actions["check"].add_argument("file", type=Path, help="a schema as PML (XML) or JSON")
    for action in actions.values():
        add_options(action, EngineConfig, only=CONTEXT_OPTIONS)


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand for each benchmark; `bench` is its name."""
    subparsers = parser.add_subparsers(title="benchmarks", required=True, metavar="NAME")
    for name, bench in BENCHES.items():
        subparser = subparsers.add_parser(name, help=bench.help, description=bench.help)
        for config_type in bench.configs:
            add_options(subparser, config_type)
        subparser.set_defaults(bench=name)


def read_config(arguments: argparse.Namespace, config_type: type[Config]) -> Config:
    """Read what command line, environment and file give to a command together.

    Ends the program with one line on an unknown name or a bad value.
    """
    return read_options(
        arguments, config_type, environment=os.environ, file=arguments.config, others=CONFIGS
    )


def read_engine_config(arguments: argparse.Namespace) -> tuple[EngineConfig, Path]:
    """Read the engine's configuration and find its model's folder or file, as `find_model` says.

    Raises LongctxError for a named model that is not installed and a path that no library would
    open.
    """
    config = read_config(arguments, EngineConfig)
    folder = find_model(config.model.model)
    if not is_unicode(str(folder)):
        raise LongctxError(
            f"the path of the model, {str(folder)!r}, is not UTF-8, as the libraries that read "
            "models want it; rename the folder, or make a link to it"
        )
    return replace(config, model=replace(config.model, model=folder)), folder


def _actions(
    parser: argparse.ArgumentParser, helps: dict[str, str]
) -> dict[str, argparse.ArgumentParser]:
    subparsers = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    actions = {}
    for name, text in helps.items():
        actions[name] = subparsers.add_parser(name, help=text, description=text)
        actions[name].set_defaults(action=name)
    return actions

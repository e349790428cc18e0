"""The command line: `longctx COMMAND`. A command is an entry of COMMANDS.

Every failure that has a cause outside of us ends in one line on stderr and status 1. What a
command runs is loaded when it is chosen: help, and a mistake in the arguments, take no second.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longctx.commands.arguments import (
    ask_arguments,
    bench_arguments,
    cache_arguments,
    prompt_cache_arguments,
    serve_arguments,
)
from longctx.errors import LongctxError


@dataclass(frozen=True, slots=True)
class Command:
    """`module` has a function `run(arguments)`, which raises LongctxError when it fails."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    module: str


COMMANDS = {
    "serve": Command("serve a model over HTTP", serve_arguments, "longctx.commands.serve"),
    "ask": Command(
        "ask a question about a file, without a server", ask_arguments, "longctx.commands.ask"
    ),
    "cache": Command(
        "see and tidy what is stored below the device; see cache --help",
        cache_arguments,
        "longctx.commands.cache",
    ),
    "prompt-cache": Command(
        "check prompt schemas; see prompt-cache --help",
        prompt_cache_arguments,
        "longctx.commands.prompt_cache",
    ),
    "bench": Command(
        "measure quality and speed; see bench --help", bench_arguments, "longctx.commands.bench"
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command: `argv`, or the arguments of this process. Ends by SystemExit on failure."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parse(argv)
    run = importlib.import_module(COMMANDS[arguments.command].module).run
    try:
        run(arguments)
    except LongctxError as error:
        raise SystemExit(f"longctx: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="longctx",
        description="Upload a long document once, ask it anything for the price of the question.",
    )
    subparsers = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", dest="command"
    )
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help)
        if argv and argv[0] == name:  # no other command's options are parsed
            command.add_arguments(subparser)
    return parser.parse_args(argv, argparse.Namespace(argv=argv))

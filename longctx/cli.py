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
    chat_arguments,
    models_arguments,
    prompt_cache_arguments,
    serve_arguments,
)
from longctx.commands.streams import (
    WRITTEN_TO_NOBODY,
    forget_what_is_unwritten,
    nobody_reads,
    open_closed_streams,
    write_what_was_given,
)
from longctx.errors import LongctxError
from longctx.process.quick_import import INTERRUPTED, interruptible


@dataclass(frozen=True, slots=True)
class Command:
    """`module` has a function `run(arguments)`, which raises LongctxError when it fails."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    module: str
    prints: bool = True  # what it is run for goes to standard output


COMMANDS = {
    "serve": Command(
        "serve a model over HTTP", serve_arguments, "longctx.commands.serve", prints=False
    ),
    "ask": Command(
        "ask a question about documents, without a server", ask_arguments, "longctx.commands.ask"
    ),
    "chat": Command(
        "converse about documents in a terminal, without a server",
        chat_arguments,
        "longctx.commands.chat",
    ),
    "models": Command(
        "list the models that can be named", models_arguments, "longctx.commands.models"
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
    closed = open_closed_streams()
    write_what_was_given()
    try:
        try:
            _run(sys.argv[1:] if argv is None else argv, closed)
        finally:
            sys.stdout.flush()  # here, and not at the very end, where a failure is a traceback
    except LongctxError as error:
        raise SystemExit(f"longctx: {error}") from error
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        forget_what_is_unwritten()
        if nobody_reads(error):
            raise SystemExit(WRITTEN_TO_NOBODY) from None
        where = "" if error.filename is None else f"{error.filename}: "
        raise SystemExit(f"longctx: {where}{error.strerror or error}") from error


def _run(argv: Sequence[str], closed: frozenset[int]) -> None:
    arguments = _parse(argv)
    command = COMMANDS[arguments.command]
    if command.prints and 1 in closed:
        raise LongctxError(
            "standard output is closed, and what this command finds is written there; leave it "
            "open, or send it to /dev/null"
        )
    with interruptible():
        run = importlib.import_module(command.module).run
    run(arguments)


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

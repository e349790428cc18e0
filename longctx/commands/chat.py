"""`longctx chat FILE...`: a conversation about documents in a terminal, without a server.

Ctrl-C stops an answer, and empties the line that is being written; Ctrl-D ends. The arrow keys find
earlier questions. `/new` forgets what was said, and keeps the documents. Where standard input is no
terminal, each line of it is a question.
"""

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from api.files.tokenizer_process import TokenizerProcess
from longctx.commands.arguments import read_engine_config
from longctx.commands.session import STANDARD_INPUT, Session, open_session
from longctx.errors import LongctxError
from longctx.options import is_unicode
from longctx.text.chat_template import Message
from longctx.text.tokenizer import Tokenizer

with contextlib.suppress(ImportError):  # lines can be edited, and earlier ones found again
    import readline  # noqa: F401

PROMPT = "> "
NEW = "/new"
HELP = f"Ctrl-C stops an answer, {NEW} forgets what was said, Ctrl-D ends."


def run(arguments: argparse.Namespace) -> None:
    """Converse until the input ends. Raises LongctxError where the documents cannot be read."""
    config, folder = read_engine_config(arguments)
    files: Sequence[Path] = arguments.files
    if STANDARD_INPUT in files:
        raise LongctxError(
            "chat reads its questions from standard input; write the document to a file, and name "
            "that, or use longctx ask"
        )
    tokenizer = Tokenizer(folder)
    process = TokenizerProcess(tokenizer)
    with asyncio.Runner() as runner, contextlib.ExitStack() as stack:
        opened = open_session(config, tokenizer, process)
        session = runner.run(opened.__aenter__())
        stack.callback(lambda: runner.run(opened.__aexit__(None, None, None)))
        with _interrupts():
            runner.run(session.read(files))
        if sys.stdin.isatty():
            print(HELP, file=sys.stderr)
        _converse(runner, session)


def _converse(runner: asyncio.Runner, session: Session) -> None:
    said: list[Message] = []
    for question in _questions():
        if question == NEW:
            said.clear()
            print("The conversation begins anew.", file=sys.stderr)
            continue
        documents = () if said else session.documents
        asked = [*said, Message("user", (*documents, question))]
        answer: list[str] = []
        try:
            with _interrupts():
                cost = runner.run(session.write_answer(asked, answer))
            print(cost, file=sys.stderr)
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
        except LongctxError as error:
            print(f"longctx: {error}; {NEW} begins a shorter conversation", file=sys.stderr)
            continue
        if text := "".join(answer):
            said = [*asked, Message("assistant", (text,))]


def _questions() -> Iterator[str]:
    """Yield the lines that are not empty, until the input ends."""
    asks = sys.stdin.isatty()
    while True:
        try:
            line = input(PROMPT if asks else "").strip()
        except EOFError:
            if asks:
                print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(f"\n{HELP}", file=sys.stderr)
            continue
        if not is_unicode(line):
            print("longctx: the question is not UTF-8 text; write it in UTF-8", file=sys.stderr)
        elif line:
            yield line


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Turns the end of a task that Ctrl-C has cancelled into what Ctrl-C is elsewhere."""
    try:
        yield
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None

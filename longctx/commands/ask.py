"""`longctx ask FILE... QUESTION`: what the server does with documents and a question, here."""

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from api.files.tokenizer_process import TokenizerProcess
from longctx.commands.arguments import read_engine_config
from longctx.commands.session import open_session
from longctx.config import EngineConfig
from longctx.errors import LongctxError
from longctx.options import is_unicode
from longctx.text.chat_template import Message
from longctx.text.tokenizer import Tokenizer


def run(arguments: argparse.Namespace) -> None:
    """Stream the answer to stdout; progress and figures go to stderr. Raises LongctxError."""
    config, folder = read_engine_config(arguments)
    if not is_unicode(arguments.question):
        raise LongctxError("the question is not UTF-8 text; write it in UTF-8")
    tokenizer = Tokenizer(folder)
    process = TokenizerProcess(tokenizer)
    try:
        asyncio.run(_ask(config, tokenizer, process, arguments.files, arguments.question))
    except asyncio.CancelledError:  # Ctrl-C, where a task that was cancelled raises it
        raise KeyboardInterrupt from None


async def _ask(
    config: EngineConfig,
    tokenizer: Tokenizer,
    tokenizer_process: TokenizerProcess,
    files: Sequence[Path],
    question: str,
) -> None:
    async with open_session(config, tokenizer, tokenizer_process) as session:
        await session.read(files)
        message = Message("user", (*session.documents, question))
        cost = await session.write_answer([message], [])
        print(f"{cost}; {time.monotonic() - session.began:.1f} s in all", file=sys.stderr)

"""Importing much: without the garbage collector, and so that Ctrl-C ends it at once."""

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = "longctx: interrupted"


@contextmanager
def uncollected() -> Iterator[None]:
    """What is made inside is never collected: for imports, whose objects stay.

    torch and transformers make 600,000 objects, of which 9,000 could be freed; looking for them
    takes a fifth of the time of their import. They are left out of later collections too.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def interruptible(clean_up: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process inside: after `clean_up`, with one line, by its status.

    For imports. An exception would come out of a package that is half imported:
    as a long traceback, as another error, or not at all.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        clean_up()
        os.write(2, f"{INTERRUPTED}\n".encode())
        os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # signals are not its business
        yield
        return
    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

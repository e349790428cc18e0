"""Importing without the garbage collector, which would look at every imported object many times."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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

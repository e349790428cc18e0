"""What an engine's process runs. Scripts for the interpreters of others: they import no longctx.

`worker.py` reads commands and answers them; `with_NAME.py` beside it is how one engine is used.
"""

"""`python -m longctx` is `longctx`."""

from longctx.cli import main

main()

"""`longctx`, and `python -m longctx`: the command line, which Ctrl-C ends from the start on."""

import importlib

from longctx.process.quick_import import interruptible


def main() -> None:
    """Run the command of this process's arguments. Ends by SystemExit on failure."""
    with interruptible():
        command_line = importlib.import_module("longctx.cli")
    command_line.main()


if __name__ == "__main__":
    main()

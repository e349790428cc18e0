"""`python -m longctx.demo`: the tour, where the packages of the extra `demo` are installed."""

import importlib

from longctx.commands.extras import require
from longctx.errors import LongctxError

TOUR = "longctx.demo.tour"  # loaded once it is known that its packages are there


def main() -> None:
    """Runs the tour. Ends by SystemExit, with one line that names the cure, without the extra."""
    try:
        require("demo", command="longctx.demo")
    except LongctxError as error:
        raise SystemExit(f"longctx: {error}") from error
    importlib.import_module(TOUR).main()


if __name__ == "__main__":
    main()

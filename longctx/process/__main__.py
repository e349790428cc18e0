"""`python -m longctx.process` is `python -m longctx.process.worker`, started sooner."""

import importlib
import os
import sys

from longctx.process.quick_import import uncollected

if __name__ == "__main__":
    with uncollected():
        worker = importlib.import_module("longctx.process.worker")
    worker.run(sys.argv[1:], os.environ)

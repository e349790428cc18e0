"""`longctx bench NAME`: from its configurations to a printed report."""

import argparse
import importlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

import transformers
from rich.console import Console

from longctx.bench import BENCHES
from longctx.bench.config import BenchConfig
from longctx.bench.options import with_model_found
from longctx.bench.report import Report, publish
from longctx.commands.arguments import read_config
from longctx.commands.extras import require
from longctx.process.quick_import import interruptible


def run(arguments: argparse.Namespace) -> None:
    """Measure, print and write a report; the command line is kept in its record.

    Ends the program with 1 where the benchmark judges and something fails. Raises ExtraMissing,
    before anything is measured, where pictures could not be drawn.
    """
    bench = BENCHES[arguments.bench]
    configs: list[Any] = [with_model_found(read_config(arguments, tree)) for tree in bench.configs]
    require("bench", command="longctx bench")
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    progress = Console(stderr=True, highlight=False)
    with interruptible():
        module = importlib.import_module(bench.module)
    report: Report = module.run(*configs, say=lambda text: progress.print(text, style="dim"))
    (common,) = (config for config in configs if isinstance(config, BenchConfig))
    command = shlex.join(["longctx", *_without_key(arguments.argv)])
    publish(report, bench=arguments.bench, command=command, out=common.out)
    if report.failures:
        raise SystemExit("\n".join(f"longctx: {failure}" for failure in report.failures))


def _without_key(argv: Sequence[str]) -> list[str]:
    """The arguments as records keep them: a key is no part of a result."""
    shown = [re.sub(r"(?s)^(--server-key=).*", r"\1...", word) for word in argv]
    for number, word in enumerate(shown[:-1]):
        if word == "--server-key":
            shown[number + 1] = "..."
    return shown

"""`longctx bench NAME`: its options, and from options to a printed report."""

import argparse
import importlib
import shlex
from collections.abc import Sequence
from typing import Any

import transformers
from rich.console import Console

from longctx.bench import BENCHES
from longctx.bench.config import BenchConfig
from longctx.bench.report import Report, publish
from longctx.commands.extras import require
from longctx.options import add_options


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand per benchmark; `arguments.bench` is its name."""
    subparsers = parser.add_subparsers(title="benchmarks", required=True, metavar="NAME")
    for name, bench in BENCHES.items():
        subparser = subparsers.add_parser(name, help=bench.help, description=bench.help)
        for config_type in bench.configs:
            add_options(subparser, config_type)
        subparser.set_defaults(bench=name)


def run_bench(name: str, configs: Sequence[Any], words: Sequence[str]) -> None:
    """Measures, prints, writes. `words` are the command line's, kept in the record.

    Raises ExtraMissing, before anything is measured, where pictures could not be drawn.
    """
    require("bench", command="longctx bench")
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    progress = Console(stderr=True, highlight=False)
    report: Report = importlib.import_module(BENCHES[name].module).run(
        *configs, say=lambda text: progress.print(text, style="dim")
    )
    (bench,) = (config for config in configs if isinstance(config, BenchConfig))
    publish(report, bench=name, command=shlex.join(["longctx", *words]), out=bench.out)

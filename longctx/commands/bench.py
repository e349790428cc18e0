"""`longctx bench NAME`: from its configurations to a printed report."""

import argparse
import importlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import transformers
from rich.console import Console

from longctx.bench import BENCHES
from longctx.bench.config import BenchConfig
from longctx.bench.report import Report, publish
from longctx.commands.arguments import read_config
from longctx.commands.extras import require
from longctx.config import EngineConfig
from longctx.model.named import find_model
from longctx.process.quick_import import interruptible


def run(arguments: argparse.Namespace) -> None:
    """Measure, print and write a report; the command line is kept in its record.

    Raises ExtraMissing, before anything is measured, where pictures could not be drawn.
    """
    bench = BENCHES[arguments.bench]
    configs: list[Any] = [_found(read_config(arguments, tree)) for tree in bench.configs]
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


def _without_key(argv: Sequence[str]) -> list[str]:
    """The arguments as records keep them: a key is no part of a result."""
    shown = [re.sub(r"(?s)^(--server-key=).*", r"\1...", word) for word in argv]
    for number, word in enumerate(shown[:-1]):
        if word == "--server-key":
            shown[number + 1] = "..."
    return shown


def _found(config: Any) -> Any:
    """The same, with a model that is given by its name as the path that this stands for."""
    if not isinstance(config, EngineConfig) or config.model.model is None:
        return config
    found = find_model(config.model.model)
    return replace(config, model=replace(config.model, model=found))

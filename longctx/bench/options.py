"""From words of a command line to the configurations of a benchmark, as the command reads them."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from longctx.config import EngineConfig
from longctx.model.named import find_model
from longctx.options import add_options, read_options


def read_configs(name: str, trees: Iterable[type], words: Sequence[str]) -> list[Any]:
    """Returns what these options say and no others: the environment is not asked.

    Ends the program with one line on a bad option, as the command does.
    """
    trees = tuple(trees)
    parser = argparse.ArgumentParser(prog=f"longctx bench {name}")
    for tree in trees:
        add_options(parser, tree)
    given = parser.parse_args(list(words))
    return [
        with_model_found(read_options(given, tree, environment={}, file=given.config))
        for tree in trees
    ]


def with_model_found(config: Any) -> Any:
    """Returns the same, with a model that is given by its name as the path that it stands for."""
    if not isinstance(config, EngineConfig) or config.model.model is None:
        return config
    return replace(config, model=replace(config.model, model=find_model(config.model.model)))

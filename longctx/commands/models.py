"""`longctx models`: what can be named instead of a folder, with what one needs to choose."""

import argparse
from collections.abc import Sequence

from longctx.model.named import NamedModel, named_models

HEADINGS = ("name", "size", "context", "license", "what it is")
RIGHT = ("size", "context")


def run(arguments: argparse.Namespace) -> None:
    """Print a table of all named models; those that are absent say what installs them."""
    for line in table(named_models()):
        print(line)


def table(models: Sequence[NamedModel]) -> list[str]:
    """Make a line of headings, and one of each model."""
    rows = [HEADINGS]
    for model in models:
        what = model.what if model.install is None else f"{model.what}; {model.install}"
        size = f"{model.size_bytes / 1e6:.1f} MB"
        rows.append((model.name, size, f"{model.context_tokens:,}", model.license, what))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if heading in RIGHT else cell.ljust(width)
            for heading, cell, width in zip(HEADINGS, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]

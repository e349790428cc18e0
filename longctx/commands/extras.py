"""The optional packages of some commands: an absent one is said in one line, with its cure."""

import importlib.util

from longctx.errors import LongctxError

# By extra, as pyproject.toml has them: the modules whose absence stops a command.
EXTRAS: dict[str, tuple[str, ...]] = {
    "bench": ("matplotlib",),
    "demo": ("matplotlib", "openai"),
}


class ExtraMissing(LongctxError):
    """A command needs a package that a plain installation leaves out."""


def require(extra: str, *, command: str) -> None:
    """Raises ExtraMissing unless every module of the extra can be imported; imports none."""
    absent = [module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None]
    if absent:
        raise ExtraMissing(
            f"{command} needs {' and '.join(absent)}: pip install 'longctx[{extra}]'"
        )

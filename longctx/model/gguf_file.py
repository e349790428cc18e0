"""A GGUF file, checked to be whole before a byte of its tensors is used.

A header has counts, then keys with values (configuration, vocabulary), then for each tensor its
name, shape, type and place; the tensors follow. Everything is read from a memory map, and nothing
in the file is executed. Read `read_gguf`.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as TensorType
from numpy.typing import NDArray

from longctx.errors import ModelRefused
from longctx.model.checkpoint import INDEX, SHARD
from longctx.model.named import SHARD_NAME, model_stem

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # of the first, no file is left
MAX_DEPTH = 3  # arrays within arrays
MAX_DIMENSIONS = 4

# The numbers of the types of values: those of a fixed size as `struct` names them.
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9

PLAIN = {
    TensorType.F32: "float32",
    TensorType.F16: "float16",
    TensorType.BF16: "bfloat16",
}
QUANTIZED = (
    TensorType.Q8_0,
    TensorType.Q4_0,
    TensorType.Q4_1,
    TensorType.Q5_0,
    TensorType.Q5_1,
    TensorType.Q4_K,
    TensorType.Q5_K,
    TensorType.Q6_K,
)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor's place: `byte_count` bytes at `offset` of `file`; `shape` is row-major."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    file: "MappedFile"
    offset: int
    byte_count: int

    def blocks(self) -> NDArray[np.uint8]:
        """The tensor's bytes [*rows, bytes of a row], in the file's own memory map."""
        data = np.frombuffer(self.file.map, np.uint8, self.byte_count, self.offset)
        return data.reshape(*self.shape[:-1], -1)

    def values(self) -> NDArray[np.float32]:
        """The tensor as float32, of its own shape: what `gguf` itself makes of it."""
        data = self.blocks()
        if self.type == TensorType.F32:
            return data.view(np.float32).astype(np.float32)  # a copy: the map is given back
        return np.asarray(gguf.dequantize(data, self.type), np.float32).reshape(self.shape)

    def give_back(self) -> None:
        """Let the memory go that reading the tensor took; it is read from the file again."""
        page = mmap.PAGESIZE
        begin = -(-self.offset // page) * page
        end = (self.offset + self.byte_count) // page * page
        if begin < end:
            self.file.map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


@dataclass(frozen=True, slots=True)
class MappedFile:
    path: Path
    map: mmap.mmap


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """A checked file, or all shards of one: `metadata` is the first shard's.

    `dtype` is as in `ModelFiles`: None where most weights are quantized.
    """

    paths: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    dtype: str | None

    @property
    def path(self) -> Path:
        """The file, or its first shard: the one to name in a message."""
        return self.paths[0]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])


def find_gguf(path: Path) -> Path | None:
    """Find the GGUF file that `path` names: itself, or the only model of a folder of such files.

    None for a folder with safetensors, or without any GGUF file. Raises ModelRefused where a folder
    has several models.
    """
    if path.suffix == ".gguf" and not path.is_dir():
        return path
    if not path.is_dir() or (path / SHARD).is_file() or (path / INDEX).is_file():
        return None
    models: dict[str, Path] = {}
    for file in sorted(path.glob("*.gguf")):
        models.setdefault(model_stem(file), file)
    if len(models) > 1:
        names = ", ".join(file.name for file in models.values())
        raise ModelRefused(f"{path} has several models: {names}; name one of these files")
    return next(iter(models.values()), None)


def read_gguf(path: Path) -> GgufFile:
    """Check a file, or all shards of one, and map it; raises ModelRefused.

    `path` may be any of the shards.
    """
    paths = _shards(path)
    metadata: dict[str, Any] = {}
    tensors: dict[str, GgufTensor] = {}
    for each in paths:
        own, found = _read_file(each)
        metadata = metadata or own
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise ModelRefused(f"{each}: the tensor {twice[0]} is in another shard too")
        tensors |= found
    if not isinstance(metadata.get("general.architecture"), str):
        raise ModelRefused(f"{path} names no architecture (general.architecture); it is no model")
    promised = metadata.get("split.tensors.count", len(tensors))
    if promised != len(tensors):
        raise ModelRefused(
            f"{path}: its {len(paths)} shards have {len(tensors)} of {promised} tensors; download "
            "it again"
        )
    types = Counter(tensor.type for tensor in tensors.values() if len(tensor.shape) > 1)
    common = types.most_common(1)
    return GgufFile(
        paths=paths,
        metadata=metadata,
        tensors=tensors,
        dtype=PLAIN.get(common[0][0]) if common else None,
    )


def _shards(path: Path) -> tuple[Path, ...]:
    shard = SHARD_NAME.fullmatch(path.name)
    if shard is None:
        return (path,)
    count = int(shard["count"])
    paths = tuple(
        path.with_name(f"{shard['stem']}-{number:05d}-of-{count:05d}.gguf")
        for number in range(1, count + 1)
    )
    for each in paths:
        if not each.is_file():
            raise ModelRefused(
                f"{path.parent} lacks {each.name}, one of {count} shards of {shard['stem']}; "
                "download it"
            )
    return paths


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    try:
        with path.open("rb") as file:
            begin = file.read(len(MAGIC))
            if begin != MAGIC:
                raise ModelRefused(
                    f"{path} is no GGUF file: it begins with {begin!r}, not {MAGIC!r}"
                )
            mapped = MappedFile(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise ModelRefused(f"cannot read {path}: {error.strerror}") from error
    return _Header(mapped).read()


class _Header:
    """Reads a header from its beginning, and never beyond the file's end."""

    def __init__(self, file: MappedFile) -> None:
        self._file, self._path, self._map = file, file.path, file.map
        self._bytes = len(self._map)
        self._at = len(MAGIC)

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        version = self._number("I")
        if version not in VERSIONS:
            raise ModelRefused(
                f"{self._path} is GGUF of version {version}, and longctx reads "
                f"{' and '.join(map(str, VERSIONS))} (little-endian); convert it again"
            )
        tensor_count, key_count = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string()
            if key in metadata:
                raise self._corrupt(f"the key {key} is there twice")
            metadata[key] = self._value(self._number("I"), MAX_DEPTH)
        places = [self._place() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._corrupt(f"its alignment is {alignment!r}")
        data = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, type_number, offset in places:
            if name in tensors:
                raise self._corrupt(f"the tensor {name} is there twice")
            tensors[name] = self._tensor(name, shape, type_number, data + offset)
        return metadata, tensors

    def _tensor(
        self, name: str, shape: tuple[int, ...], type_number: int, offset: int
    ) -> GgufTensor:
        kind = _type(type_number)
        if kind not in PLAIN and kind not in QUANTIZED:
            served = ", ".join(each.name for each in (*PLAIN, *QUANTIZED))
            raise ModelRefused(
                f"{self._path}: the tensor {name} at byte {offset:,} is of type "
                f"{kind.name if kind else type_number}; longctx reads {served}"
            )
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if 0 in shape:
            raise self._corrupt(f"the tensor {name} is empty")
        if shape[-1] % block:
            raise self._corrupt(
                f"the tensor {name} has rows of {shape[-1]}, no multiple of {block}"
            )
        byte_count = math.prod(shape) // block * block_bytes
        if offset + byte_count > self._bytes:
            raise ModelRefused(
                f"{self._path} is truncated: the tensor {name} is bytes {offset:,} to "
                f"{offset + byte_count:,}, and the file has {self._bytes:,}; download it again"
            )
        return GgufTensor(name, kind, shape, self._file, offset, byte_count)

    def _place(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._corrupt(f"the tensor {name} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        return name, shape, self._number("I"), self._number("Q")

    def _value(self, kind: int, depth: int) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == STRING:
            return self._string()
        if kind != ARRAY or not depth:
            raise self._corrupt(f"it has a value of type {kind}")
        kind, count = self._number("I"), self._number("Q")
        if kind in SCALARS:
            code = SCALARS[kind]
            raw = self._take(count * struct.calcsize(f"<{code}"))
            return list(struct.unpack(f"<{count}{code}", raw))
        return [self._value(kind, depth - 1) for _ in range(count)]

    def _string(self) -> str:
        raw = self._take(self._number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            # A vocabulary may have pieces of characters; they are told apart, never shown.
            return raw.decode(errors="surrogateescape")

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))
        return value

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > self._bytes:
            raise ModelRefused(
                f"{self._path} is truncated or corrupt: its header needs {count:,} bytes at byte "
                f"{self._at:,}, and the file has {self._bytes:,}; download it again"
            )
        raw = self._map[self._at : end]
        self._at = end
        return raw

    def _corrupt(self, what: str) -> ModelRefused:
        return ModelRefused(
            f"{self._path} is corrupt: {what} (header, before byte {self._at:,}); download it again"
        )


def _type(number: int) -> TensorType | None:
    try:
        return TensorType(number)
    except ValueError:
        return None

"""What the machine can do at best: the rates that kernels are measured against, taken in their run.

Memory: on a CPU the fastest of several plain reads of an array that no cache holds, on a GPU a
copy, which counts for what it reads and what it writes. Arithmetic: square matrix products. All
through torch, on its threads or on the device.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Protocol

import torch
from torch import Tensor

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
READ_BYTES = 256 << 20
COPY_BYTES = 1 << 30  # on a GPU
GEMM_DIM = 1024
GPU_GEMM_DIM = 8192
CPU = torch.device("cpu")


class Bandwidth(Protocol):
    """A way to move memory, measured by every call of `take`."""

    metric: str

    def take(self) -> None: ...

    @property
    def bytes_per_second(self) -> float: ...


def memory_bandwidth(device: torch.device) -> Bandwidth:
    """Returns what decode on this device is held against."""
    if device.type == "cpu":
        return ReadBandwidth()
    source = torch.ones(COPY_BYTES // 4, device=device)
    return CopyBandwidth(source, torch.empty_like(source))


class ReadBandwidth:
    """Measures reading. `bytes_per_second` is the best way's median over all calls of `take`."""

    metric = "memory read"

    def __init__(self) -> None:
        self._array = torch.ones(READ_BYTES // 4)
        self._ways: dict[str, Callable[[], object]] = {
            "sum": self._array.sum,
            "dot": lambda: torch.dot(self._array, self._array),
            "max": self._array.max,
        }
        self._seconds: dict[str, list[float]] = {name: [] for name in self._ways}

    def take(self) -> None:
        for name, read in self._ways.items():
            self._seconds[name].append(seconds_of(read))

    @property
    def bytes_per_second(self) -> float:
        return READ_BYTES / min(median(taken) for taken in self._seconds.values())


class CopyBandwidth:
    """Measures copying one tensor into another, which may be on another device.

    Within a device the bytes are read and written, and count twice; between two they count once.
    """

    metric = "memory copy"

    def __init__(self, source: Tensor, target: Tensor) -> None:
        self._source, self._target = source, target
        within = source.device == target.device
        self._moved_bytes = source.nbytes * (2 if within else 1)
        self._device = target.device if source.device.type == "cpu" else source.device
        self._seconds: list[float] = []

    def take(self) -> None:
        copy = partial(self._target.copy_, self._source, non_blocking=True)
        self._seconds.append(seconds_of(copy, self._device))

    @property
    def bytes_per_second(self) -> float:
        return self._moved_bytes / median(self._seconds)


class GemmRate:
    """Measures products of two square matrices of one type: of 1,024 rows, on a GPU of 8,192."""

    def __init__(self, dtype: torch.dtype, device: torch.device = CPU) -> None:
        self._dim = GEMM_DIM if device.type == "cpu" else GPU_GEMM_DIM
        self._device = device
        self._left = torch.randn(self._dim, self._dim, device=device).to(dtype)
        self._right = torch.randn(self._dim, self._dim, device=device).to(dtype)
        self._seconds: list[float] = []

    def take(self) -> None:
        self._seconds.append(seconds_of(lambda: torch.mm(self._left, self._right), self._device))

    @property
    def flop_per_second(self) -> float:
        return float(2 * self._dim**3 / median(self._seconds))


def settle(device: torch.device) -> None:
    """Waits until a GPU has done what it was asked; a CPU has, whenever a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device = CPU) -> float:
    """Returns how long the work takes, with nothing before it still under way on the device."""
    settle(device)
    began = time.perf_counter()
    work()
    settle(device)
    return time.perf_counter() - began


def alternate(works: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Runs each work once per round, so that a slow moment hits all; returns their figures."""
    taken: list[list[float]] = [[] for _ in works]
    for number in range(-1, rounds):  # round -1 warms up
        for work, figures in zip(works, taken, strict=True):
            figure = work()
            if number >= 0:
                figures.append(figure)
    return taken


def last_level_cache_bytes(device: torch.device = CPU) -> int:
    """Returns the size of the largest cache as Linux tells it, 64 MiB where it does not.

    Of a GPU it is the second-level cache.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in _CACHES.glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
        if text[-1:] in units and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes, default=64 << 20)

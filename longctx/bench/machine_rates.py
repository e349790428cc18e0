"""What the machine can do at best: the rates that kernels are measured against, taken in their run.

Memory: the fastest of several plain reads of an array that no cache holds. Arithmetic: square
matrix products. Both through torch, on its threads.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
READ_BYTES = 256 << 20
GEMM_DIM = 1024


class ReadBandwidth:
    """Measures reading. `bytes_per_second` is the best way's median over all calls of `take`."""

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


class GemmRate:
    """Measures products of two [1024, 1024] matrices of one type."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._left = torch.randn(GEMM_DIM, GEMM_DIM).to(dtype)
        self._right = torch.randn(GEMM_DIM, GEMM_DIM).to(dtype)
        self._seconds: list[float] = []

    def take(self) -> None:
        self._seconds.append(seconds_of(lambda: torch.mm(self._left, self._right)))

    @property
    def flop_per_second(self) -> float:
        return float(2 * GEMM_DIM**3 / median(self._seconds))


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
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


def last_level_cache_bytes() -> int:
    """Returns the size of the largest cache as Linux tells it, 64 MiB where it does not."""
    sizes = []
    for path in _CACHES.glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
        if text[-1:] in units and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes, default=64 << 20)

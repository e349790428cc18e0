"""How much memory and how many cores this process may use: the machine's, or a container's.

A container sees the whole machine in `/proc/meminfo` and in the number of CPUs; what it may use is
written in its control groups, v1 or v2. A limit of any group above counts too, so every folder from
the process's own group up to the root is read. What cannot be read limits nothing.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc/self")
CGROUPS = Path("/sys/fs/cgroup")


def memory_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Return the bytes of memory that this process may use, with all others of its container."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _folders("memory", proc, cgroups):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limits += [int(word) for word in _words(folder / name)[:1] if word.isdigit()]
    return min(limits)


def cores(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Return how many cores this process may keep busy: at least 1, a part of one counts whole."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    limits = [float(affinity or os.cpu_count() or 1)]
    for folder in _folders("cpu", proc, cgroups):
        quota = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]
        if len(quota) == 2 and all(word.isdigit() for word in quota) and int(quota[1]):
            limits.append(int(quota[0]) / int(quota[1]))  # without a limit it says "max" or -1
    return max(1, math.ceil(min(limits)))


def _folders(controller: str, proc: Path, cgroups: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups for a controller, up to the root of each tree.

    A line `0::/a/b` is of v2, mounted at the top or beside v1 trees as `unified`; `4:memory:/a` is
    of v1. A container often sees its own group as the root, whatever the line says.
    """
    try:
        lines = (proc / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            trees = [cgroups, cgroups / "unified"]
        elif controller in names.split(","):
            trees = [cgroups / controller, cgroups / names]
        else:
            continue
        for tree in trees:
            folder = tree / path.lstrip("/")
            while folder != tree:
                yield folder
                folder = folder.parent
            yield tree


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except (OSError, ValueError):
        return []

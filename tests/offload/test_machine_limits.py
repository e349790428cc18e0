"""A container's limits count, in either version of control groups and at any level above."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from offload.machine_limits import CGROUPS, cores, memory_bytes

MACHINE_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
MACHINE_CORES = len(os.sched_getaffinity(0))
MIB = 1 << 20


def process_in(folder: Path, cgroup: str, files: dict[str, str]) -> tuple[Path, Path]:
    """Write what /proc/self and /sys/fs/cgroup show a process."""
    proc, cgroups = folder / "proc", folder / "cgroup"
    proc.mkdir()
    (proc / "cgroup").write_text(cgroup)
    for name, content in files.items():
        file = cgroups / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return proc, cgroups


@pytest.mark.parametrize(
    ("cgroup", "files"),
    [
        ("0::/\n", {"memory.max": f"{100 * MIB}\n", "cpu.max": "50000 100000\n"}),
        (
            "0::/kubepods/pod1/container\n",
            {
                "kubepods/pod1/container/memory.max": "max\n",
                "kubepods/pod1/memory.max": f"{100 * MIB}\n",
                "kubepods/pod1/container/cpu.max": "max 100000\n",
                "kubepods/cpu.max": "100000 100000\n",
            },
        ),
        (
            "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/\n",
            {
                "memory/memory.limit_in_bytes": f"{100 * MIB}\n",  # its own group as the root
                "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "20000\n",
                "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            },
        ),
        (
            "5:memory:/job\n4:cpu:/job\n0::/\n",
            {
                "memory/job/memory.limit_in_bytes": f"{100 * MIB}\n",
                "cpu/cpu.cfs_quota_us": "90000\n",
                "cpu/cpu.cfs_period_us": "100000\n",
            },
        ),
    ],
)
def test_the_limits_of_a_container_count(
    tmp_path: Path, cgroup: str, files: dict[str, str]
) -> None:
    proc, cgroups = process_in(tmp_path, cgroup, files)
    assert memory_bytes(proc, cgroups) == 100 * MIB
    assert cores(proc, cgroups) == 1


def test_without_limits_the_machine_is_the_limit(tmp_path: Path) -> None:
    files = {
        "memory.max": "max\n",
        "cpu.max": "max 100000\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "cpu/cpu.cfs_quota_us": "-1\n",
        "cpu/cpu.cfs_period_us": "100000\n",
    }
    proc, cgroups = process_in(tmp_path, "5:memory:/\n4:cpu:/\n0::/\n", files)
    assert memory_bytes(proc, cgroups) == MACHINE_BYTES
    assert cores(proc, cgroups) == MACHINE_CORES


def test_what_cannot_be_read_limits_nothing(tmp_path: Path) -> None:
    assert memory_bytes(tmp_path, tmp_path) == MACHINE_BYTES
    assert cores(tmp_path, tmp_path) == MACHINE_CORES


def test_a_real_limit_is_seen() -> None:
    """Puts a process into a memory group of its own, where this machine lets us make one."""
    tree = CGROUPS / "memory"
    group = tree / f"longctx-test-{uuid.uuid4().hex}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("this process may not make a memory group of version 1")
    script = "from offload.machine_limits import memory_bytes; print(memory_bytes())"
    try:
        (group / "memory.limit_in_bytes").write_text(str(100 * MIB))
        enter = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -c '{script}'"
        said = subprocess.run(
            ["sh", "-c", enter],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        )
    finally:
        group.rmdir()
    assert int(said.stdout) == 100 * MIB

"""Opens the tiers below the device, as configured."""

import os
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from longctx.config import CacheConfig
from longctx.errors import LongctxError
from longctx.kv.memory import KVMemory
from offload.disk.extent_io import ExtentIO
from offload.disk.folder import FolderRefused
from offload.disk.tier import DiskBounds, DiskTier, DiskTierConfig
from offload.eviction import POLICIES
from offload.host import HostTier
from offload.machine_limits import memory_bytes
from offload.store import KVStore
from offload.units import GIB

HOST_SHARE = 8  # of RAM, where a GPU needs room below its own
READ_DEADLINE_SECONDS = 5.0
OWNER_SECONDS = 10.0  # a process that was killed may hold the folder so long


def open_store(
    config: CacheConfig, memory: KVMemory, *, extents: ExtentIO | None = None
) -> KVStore | None:
    """Open the store; None where nothing is kept below the device. Raises LongctxError.

    `extents` moves the bytes of pages that do not all lie in this process.
    """
    tiers = [  # the fastest first
        None if extents is not None else _host(config, memory),
        _disk(config, extents),
    ]
    present = [tier for tier in tiers if tier is not None]
    if not present:
        return None
    return KVStore(present, read_deadline_seconds=READ_DEADLINE_SECONDS)


def _host(config: CacheConfig, memory: KVMemory) -> HostTier | None:
    cuda = memory.device.type == "cuda"
    capacity = memory_bytes() // HOST_SHARE if cuda else 0
    if config.host_pool_gib is not None:
        capacity = int(config.host_pool_gib * GIB)
    if not capacity:
        return None
    page_bytes = [size for pool in memory.packed for size in pool.page_bytes]
    policy = POLICIES[config.eviction_policy]()
    if not cuda:
        return HostTier(capacity_bytes=capacity, page_bytes=page_bytes, policy=policy)
    return HostTier(capacity_bytes=capacity, page_bytes=page_bytes, policy=policy, allocate=pinned)


def _disk(config: CacheConfig, extents: ExtentIO | None) -> DiskTier | None:
    if config.kv_dir is None:
        return None
    folder = config.kv_dir.expanduser()
    deadline = time.monotonic() + OWNER_SECONDS
    while True:
        try:
            bounds = DiskBounds(
                cap_bytes=_cap_bytes(config, folder),
                ttl_seconds=None if config.disk_ttl_days is None else config.disk_ttl_days * 86_400,
                free_floor_bytes=int(config.disk_free_gib * GIB),
            )
            return DiskTier(
                DiskTierConfig(folder=folder, bounds=bounds, compress=config.disk_compress),
                POLICIES[config.eviction_policy](),
                extents=extents,
            )
        except FolderRefused as error:
            if time.monotonic() > deadline:
                raise LongctxError(str(error)) from error
            time.sleep(0.1)
        except OSError as error:
            raise LongctxError(
                f"cannot use {folder} for KV blocks: {error.strerror}; choose another --kv-dir"
            ) from error


def _cap_bytes(config: CacheConfig, folder: Path) -> int:
    if config.disk_cap_gib is not None:
        return int(config.disk_cap_gib * GIB)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    stored = sum(file.stat().st_size for file in folder.glob("*.kv"))
    status = os.statvfs(folder)
    return (status.f_bavail * status.f_frsize + stored) // 2


def pinned(size_bytes: int) -> NDArray[np.uint8]:
    """Return memory that a GPU copies from at full speed; MemoryError where no more can be pinned.

    A GPU that has failed for good raises here too; the next step finds that out and ends.
    """
    try:
        slab: NDArray[np.uint8] = torch.empty(
            size_bytes, dtype=torch.uint8, pin_memory=True
        ).numpy()
    except RuntimeError as error:
        raise MemoryError(str(error)) from error
    return slab

"""`longctx cache ls|rm|verify|gc`: what the disk tier holds, seen and tidied without a server.

Only one process may write to the tier's folder: while a server runs, `ls` and `verify` look, and
`rm` and `gc` say that they cannot.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.table import Table

from api.config import ServerConfig
from compress.shape import BLOCK_TOKENS
from longctx.commands.arguments import read_config
from longctx.config import CacheConfig, EngineConfig
from longctx.errors import LongctxError
from offload.disk.tier import (
    DiskBounds,
    DiskEntry,
    DiskTier,
    DiskTierConfig,
    FolderInUse,
    FolderRefused,
)
from offload.eviction import LRU
from offload.key import BlockKey
from offload.units import GIB, KIB, MIB

DAY_SECONDS = 86_400.0
UNBOUNDED = DiskBounds()
SHORT_HEX = 12  # digits shown of a key
LEAST_HEX = 4  # digits that `rm` asks for

Action = Callable[[argparse.Namespace, Path, CacheConfig], None]


def run(arguments: argparse.Namespace) -> None:
    """Do one action on the disk tier's folder.

    Raises LongctxError where the folder cannot be opened, or is not as it should be.
    """
    config = read_config(arguments, EngineConfig).cache
    folder = config.kv_dir or read_config(arguments, ServerConfig).folder / "kv"
    try:
        ACTIONS[arguments.action](arguments, folder.expanduser(), config)
    except FolderRefused as error:
        raise LongctxError(str(error)) from error
    except OSError as error:
        if error.filename is None:  # of what is printed, not of the folder
            raise
        raise LongctxError(f"cannot use {folder}: {error.strerror}") from error


def _ls(arguments: argparse.Namespace, folder: Path, config: CacheConfig) -> None:
    with closing(_open(folder, read_only=True)) as tier:
        entries = tier.entries()
    table = extent_table(entries) if arguments.extents else namespace_table(entries)
    table.title = str(folder)
    table.caption = f"{len(entries):,} extents, {_bytes(sum(e.file_bytes for e in entries))}"
    Console().print(table)


def _rm(arguments: argparse.Namespace, folder: Path, config: CacheConfig) -> None:
    if bool(arguments.names) == arguments.all:
        raise LongctxError("rm needs the names of what to delete, or --all; ls shows them")
    short = [name for name in arguments.names if len(name) < LEAST_HEX]
    if short:
        raise LongctxError(f"{short[0]!r} is too short; give at least {LEAST_HEX} digits")
    with closing(_open(folder, read_only=False)) as tier:
        entries = tier.entries()
        keys = chosen(entries, [""] if arguments.all else arguments.names)
        tier.drop(keys)
        left = tier.entries()
    freed = sum(e.file_bytes for e in entries) - sum(e.file_bytes for e in left)
    _say(f"deleted {len(entries) - len(left):,} extents, {_bytes(freed)}; {len(left):,} are left")


def _verify(arguments: argparse.Namespace, folder: Path, config: CacheConfig) -> None:
    try:
        tier = _open(folder, read_only=False)
    except FolderInUse:
        _say("a server is running: bad files are named, and left to it")
        tier = _open(folder, read_only=True)
    begin = time.monotonic()
    with closing(tier):
        found = tier.verify(_say)
        quarantined = tier.stats().quarantine_files
    _say(
        f"{found.extents:,} extents are whole, {_bytes(found.num_bytes)} read in "
        f"{time.monotonic() - begin:.1f} s"
    )
    if found.corrupt:
        raise LongctxError(
            f"{found.corrupt:,} extents are not what was written, {quarantined:,} files are in "
            "quarantine; their text is computed again when needed"
        )


def _gc(arguments: argparse.Namespace, folder: Path, config: CacheConfig) -> None:
    before = _entries(folder)
    cap_gib, ttl_days = config.disk_cap_gib, config.disk_ttl_days
    with closing(
        _open(
            folder,
            read_only=False,
            bounds=DiskBounds(
                cap_bytes=None if cap_gib is None else int(cap_gib * GIB),
                ttl_seconds=None if ttl_days is None else ttl_days * DAY_SECONDS,
                free_floor_bytes=int(config.disk_free_gib * GIB),
            ),
        )
    ) as tier:
        tier.gc()
        left, evictions = tier.entries(), tier.stats().evictions
    freed = sum(e.file_bytes for e in before) - sum(e.file_bytes for e in left)
    _say(
        f"deleted {evictions['ttl']:,} extents for their age, "
        f"{evictions['cap']:,} over the cap, "
        f"{evictions['space']:,} for free space: {_bytes(freed)}; "
        f"{len(left):,} are left"
    )


ACTIONS: dict[str, Action] = {"ls": _ls, "rm": _rm, "verify": _verify, "gc": _gc}


def namespace_table(entries: Iterable[DiskEntry]) -> Table:
    """Make a table with a row for each namespace and layer group."""
    rows: defaultdict[tuple[BlockKey, int], list[DiskEntry]] = defaultdict(list)
    for entry in entries:
        rows[entry.meta.run.namespace, entry.meta.run.group].append(entry)
    table = _table("namespace", "group", "extents", "tokens", "bytes", "to compute", "retained")
    table.add_column("last used", justify="right")
    for (namespace, group), held in sorted(rows.items()):
        table.add_row(
            namespace.hex()[:SHORT_HEX],
            str(group),
            f"{len(held):,}",
            f"{sum(e.num_blocks for e in held) * BLOCK_TOKENS:,}",
            _bytes(sum(e.file_bytes for e in held)),
            f"{sum(e.meta.cost_seconds for e in held):,.1f} s",
            f"{sum(e.meta.retained for e in held):,}",
            _ago(max(e.used_at for e in held)),
        )
    return table


def extent_table(entries: Iterable[DiskEntry]) -> Table:
    """Make a table with a row for each extent, chain by chain."""
    table = _table("extent", "namespace", "group", "first token", "tokens", "bytes", "to compute")
    for name in ("retained", "written", "last used"):
        table.add_column(name, justify="right")
    for entry in entries:
        meta, run = entry.meta, entry.meta.run
        table.add_row(
            entry.name[:SHORT_HEX],
            run.namespace.hex()[:SHORT_HEX],
            str(run.group),
            f"{run.first_block * BLOCK_TOKENS:,}",
            f"{entry.num_blocks * BLOCK_TOKENS:,}",
            _bytes(entry.file_bytes),
            f"{meta.cost_seconds:,.1f} s",
            "yes" if meta.retained else "",
            _ago(meta.created_at),
            _ago(entry.used_at),
        )
    return table


def chosen(entries: Sequence[DiskEntry], names: Sequence[str]) -> set[BlockKey]:
    """Find the keys of the named namespaces and extents, and of what follows in their chains.

    Raises LongctxError for a name that nothing begins with.
    """
    keys: set[BlockKey] = set()
    unused = set(names)
    for entry in sorted(entries, key=lambda entry: entry.meta.run.first_block):
        own = (entry.meta.run.namespace.hex(), entry.name)
        matching = {name for name in names if any(text.startswith(name) for text in own)}
        unused -= matching
        if matching or entry.meta.run.parent in keys or not keys.isdisjoint(entry.keys[:1]):
            keys.update(entry.keys)
    unused.discard("")  # everything, and there is nothing
    if unused:
        raise LongctxError(f"nothing is called {sorted(unused)[0]}; ls shows what there is")
    return keys


def _open(folder: Path, *, read_only: bool, bounds: DiskBounds = UNBOUNDED) -> DiskTier:
    """Open the tier. Without bounds nothing leaves by being looked at."""
    if not folder.is_dir():
        raise LongctxError(f"{folder} is no folder: nothing was stored there; see --store-dir")
    config = DiskTierConfig(folder=folder, bounds=bounds, read_only=read_only)
    return DiskTier(config, LRU[str]())


def _entries(folder: Path) -> list[DiskEntry]:
    with closing(_open(folder, read_only=True)) as tier:
        return tier.entries()


def _table(*columns: str) -> Table:
    table = Table(title_justify="left", caption_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def _bytes(count: int) -> str:
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"


def _ago(moment: float) -> str:
    seconds = max(time.time() - moment, 0.0)
    for unit, size in (("d", DAY_SECONDS), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _say(text: str) -> None:
    Console(highlight=False, soft_wrap=True).print(text, markup=False)

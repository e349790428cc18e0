"""A file system that remembers what was asked of it, and what a loss of power may leave of that.

Certain are the bytes of a file up to its last `sync` and the names in a folder up to its last
`sync_folder`. Of everything after, each write and each name may have come through or not, and a
write in part.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offload.disk.filesystem import FileSystem


@dataclass
class Inode:
    synced: bytes = b""
    writes: list[tuple[int, bytes]] = field(default_factory=list)  # since then

    def after(self, chance: random.Random | None) -> bytes:
        """Return the bytes; with `chance`, bytes that a loss of power may leave."""
        data = bytearray(self.synced)
        for offset, written in self.writes:
            fate = chance.choice(("whole", "cut", "zeros", "none")) if chance else "whole"
            if fate == "none":
                continue
            if fate == "cut" and chance:
                written = written[: chance.randrange(len(written) + 1)]
            if fate == "zeros":
                written = bytes(len(written))
            data.extend(bytes(max(offset + len(written) - len(data), 0)))
            data[offset : offset + len(written)] = written
        return bytes(data)


@dataclass
class Folder:
    synced: dict[str, Inode] = field(default_factory=dict)
    changes: list[tuple[str, Inode | None]] = field(default_factory=list)  # None: removed

    def after(self, chance: random.Random | None) -> dict[str, Inode]:
        names = dict(self.synced)
        for name, inode in self.changes:
            if chance and chance.random() < 0.5:
                continue
            if inode is None:
                names.pop(name, None)
            else:
                names[name] = inode
        return names


class PowerLost(Exception):
    """The power is off: nothing that is asked for from now on happens."""


class RecordingFiles(FileSystem):
    """Works on real files, and knows what of them is certain. The power fails after `calls` calls.

    From then on PowerLost is raised. It is no OSError, so nobody gets to clean up.
    """

    def __init__(self, calls: int | None = None) -> None:
        self.calls = 0
        self._left = calls
        self._folders: dict[Path, Folder] = {}
        self._inodes: dict[int, Inode] = {}  # by descriptor

    def create(self, path: Path) -> int:
        self._call()
        descriptor = super().create(path)
        inode = self._inodes[descriptor] = Inode()
        self._folder(path).changes.append((path.name, inode))
        return descriptor

    def write(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> None:
        for buffer in buffers:
            self._call()
            super().write(descriptor, [buffer], offset)
            self._inodes[descriptor].writes.append((offset, bytes(buffer)))
            offset += len(buffer)

    def sync(self, descriptor: int) -> None:
        self._call()
        inode = self._inodes[descriptor]
        inode.synced, inode.writes = inode.after(None), []

    def sync_folder(self, folder: Path) -> None:
        self._call()
        found = self._folders.setdefault(folder, Folder())
        found.synced, found.changes = found.after(None), []

    def rename(self, path: Path, to: Path) -> None:
        self._call()
        super().rename(path, to)
        inode = self._folder(path).after(None)[path.name]
        self._folder(path).changes.append((path.name, None))
        self._folder(to).changes.append((to.name, inode))

    def remove(self, path: Path) -> None:
        self._call()
        super().remove(path)
        self._folder(path).changes.append((path.name, None))

    def close(self, descriptor: int) -> None:
        super().close(descriptor)  # also without power: a test keeps no descriptors
        self._inodes.pop(descriptor, None)

    def replay(self, folder: Path, to: Path, chance: random.Random) -> None:
        """Write to `to` what may be found in `folder` when the power is back."""
        for found, content in self._folders.items():
            target = to / os.path.relpath(found, folder)
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name, inode in content.after(chance).items():
                (target / name).write_bytes(inode.after(chance))

    def _folder(self, path: Path) -> Folder:
        return self._folders.setdefault(path.parent, Folder())

    def _call(self) -> None:
        self.calls += 1
        if self._left is not None and self.calls > self._left:
            raise PowerLost

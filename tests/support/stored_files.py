"""What lies in a folder while somebody writes there: files are renamed between two looks."""

from pathlib import Path


def files_in(folder: Path) -> dict[Path, bytes]:
    """Read every file; look again where one was renamed or removed meanwhile."""
    while True:
        try:
            return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        except FileNotFoundError:
            continue


def files_holding(folder: Path, *needles: bytes) -> list[Path]:
    """Find the files that have one of the needles in them."""
    found = files_in(folder).items()
    return [path for path, data in found if any(needle in data for needle in needles)]

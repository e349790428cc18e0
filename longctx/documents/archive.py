"""Trees of files as .zip or .tar.gz: the text of each under its path as a heading."""

import tarfile
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO

from longctx.documents.read_text import ReadText, TextWriter, Unreadable
from longctx.documents.zip_files import read_member

MAX_FILES = 20_000
# Of one tree: what is read of a file at most, so that one cannot take all of the memory.
MAX_FILE_BYTES = 64 << 20

ReadFile = Callable[[bytes, str], ReadText]


def read_zip(data: bytes, read_file: ReadFile, *, limit_characters: int) -> ReadText:
    """Read what `read_file` can read of a ZIP archive. Raises Unreadable."""
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            names = sorted(each.filename for each in archive.infolist() if not each.is_dir())
            files = (
                (name, lambda name=name: read_member(archive, name, limit_bytes=MAX_FILE_BYTES))
                for name in names
            )
            return _read_tree(files, len(names), "zip", read_file, limit_characters)
    except zipfile.BadZipFile as error:
        raise Unreadable(f"the ZIP archive is broken: {error}") from error


def read_tar(data: bytes, read_file: ReadFile, *, limit_characters: int) -> ReadText:
    """Read what `read_file` can read of a tar archive, compressed or not. Raises Unreadable."""
    try:
        with tarfile.open(fileobj=BytesIO(data)) as archive:
            members = []
            for member in archive:
                if member.isfile():
                    members.append(member)
                if len(members) > MAX_FILES:
                    break
            members.sort(key=lambda member: member.name)
            files = ((each.name, lambda each=each: _member(archive, each)) for each in members)
            return _read_tree(files, len(members), "tar", read_file, limit_characters)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise Unreadable(f"the tar archive is broken: {error}") from error


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_FILE_BYTES:
        raise Unreadable(f"it is larger than {MAX_FILE_BYTES >> 20} MiB")
    file = archive.extractfile(member)
    assert file is not None, "a file, no folder"
    return file.read()


def _read_tree(
    files: Iterator[tuple[str, Callable[[], bytes]]],
    count: int,
    format: str,
    read_file: ReadFile,
    limit_characters: int,
) -> ReadText:
    if count > MAX_FILES:
        raise Unreadable(f"the archive has more than {MAX_FILES:,} files; upload it in parts")
    writer = TextWriter(limit_characters=limit_characters)
    skipped: list[str] = []
    for name, content in files:
        try:
            text = read_file(content(), name).text
        except Unreadable as error:
            skipped.append(f"{name}: {error}")
            continue
        writer.begin(name)
        writer.add(f"# {name}\n\n{text.rstrip()}\n\n")
    if writer.characters == 0:
        raise Unreadable("the archive has no file with text")
    return writer.finished(format, skipped=tuple(skipped))

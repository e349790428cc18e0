"""Reads text that a machine has anyway, for training and evaluation; the project keeps none of it.

Training reads installed packages, manual pages and documentation, and this package's own grammar.
Evaluation reads Python's standard library, which training never reads.
"""

from __future__ import annotations

import gzip
import html
import random
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from longctx.needles.grammar import sentence
from longctx.needles.values import Words

FILE_CHARACTERS = 60_000  # of one file, so that no single one dominates
STDLIB = re.compile(r"/python[23](\.\d+)?/(?!site-packages|dist-packages)|/pydoc_data/")


def stdlib_text(seed: int, characters: int) -> str:
    """Read about `characters` of Python's standard library, files in random order.

    It is for evaluation only. There are fewer where the library is smaller; tests and installed
    packages are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.rglob("*.py"))
    skip = {"site-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
    files = [path for path in files if not skip.intersection(path.relative_to(root).parts)]
    return _take(files, random.Random(f"stdlib {seed}"), characters, _plain)


def training_text(seed: int, megabytes: int) -> Iterator[tuple[str, str]]:
    """Yield (source, text), about `megabytes` in all; sources that a machine lacks are left out."""
    site = Path(sysconfig.get_path("purelib"))
    everywhere = Path("/usr")
    plans: list[tuple[str, Path, tuple[str, ...], float, Callable[[str], str]]] = [
        ("packages", site, ("*.py",), 0.24, _plain),
        ("readmes", site, ("METADATA", "*.md", "*.rst", "*.txt"), 0.06, _plain),
        ("manual", everywhere / "share/man", ("*.gz", "*.[1-8]"), 0.18, _roff),
        ("documentation", everywhere / "share/doc", ("*",), 0.14, _markup),
        ("perl", everywhere / "share/perl", ("*.pod", "*.pm"), 0.07, _plain),
        ("rust", Path.home() / ".rustup/toolchains", ("*.html", "*.md"), 0.12, _markup),
        ("node", everywhere / "lib/node_modules", ("*.md", "*.js"), 0.05, _markup),
    ]
    for name, root, patterns, share, clean in plans:
        rng = random.Random(f"{name} {seed}")
        files = sorted({path for pattern in patterns for path in _files(root, pattern)})
        yield name, _take(files, rng, int(share * megabytes * 1e6), clean)
    rng, words = random.Random(f"grammar {seed}"), Words(heldout=None)
    pieces: list[str] = []
    size = 0
    while size < 0.14 * megabytes * 1e6:
        pieces.append(sentence(rng, words) + rng.choice((" ", " ", " ", "\n", "\n\n")))
        size += len(pieces[-1])
    yield "grammar", "".join(pieces)


def _files(root: Path, pattern: str) -> Iterator[Path]:
    if not root.is_dir():
        return
    for path in root.rglob(pattern):
        if path.is_file() and not STDLIB.search(str(path)):
            yield path


def _take(
    files: list[Path], rng: random.Random, characters: int, clean: Callable[[str], str]
) -> str:
    rng.shuffle(files)
    pieces: list[str] = []
    size = 0
    for path in files:
        if size >= characters:
            break
        text = _read(path)
        if text is None:
            continue
        text = clean(text)
        if len(text) > FILE_CHARACTERS:
            start = rng.randrange(len(text) - FILE_CHARACTERS)
            text = text[start : start + FILE_CHARACTERS]
        if len(text) < 200 or max(map(len, text.split("\n"))) > 4000:  # empty, or minified
            continue
        pieces.append(text)
        size += len(text)
    return "\n".join(pieces)[:characters]


def _read(path: Path) -> str | None:
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        return data[:2_000_000].decode("utf-8")
    except (OSError, UnicodeDecodeError, EOFError, gzip.BadGzipFile):
        return None


def _plain(text: str) -> str:
    return text.replace("\r\n", "\n")


def _roff(text: str) -> str:
    """Strip a manual page of its markup."""
    text = re.sub(r'(?m)^[.\']\\?".*$', "", text)
    text = re.sub(r"(?m)^\.(\w+) ?", "", text)
    text = re.sub(r"\\f.|\\s[-+]?\d|\\[&|^/,]", "", text)
    return re.sub(r"\\\((\w\w)", "", text.replace("\\-", "-").replace("\\e", "\\"))


def _markup(text: str) -> str:
    """Strip an HTML page of its markup; other text stays as it is."""
    if "<html" not in text[:2000].lower() and "<!doctype" not in text[:2000].lower():
        return _plain(text)
    text = re.sub(r"(?s)<(script|style|nav|head).*?</\1>", " ", text)
    text = html.unescape(re.sub(r"<[^>]+>", " ", text))
    return re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t]+", " ", text))


if __name__ == "__main__":
    for source, body in training_text(0, int(sys.argv[1])):
        print(f"{source:15} {len(body) / 1e6:6.1f} MB  {body[20000:20200]!r}")

"""Filler for haystacks: sentences of a user's own texts, or generated ones."""

import random
import re
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from longctx.documents.read_text import Unreadable
from longctx.documents.reader import read_document
from longctx.errors import InvalidRequest
from longctx.needles.ruler_tasks import Sentences, generated_sentences

LEAST_SENTENCES = 8
_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n+")


class TextFiller:
    """Sentences of one file, or of all files of a folder, in their order.

    A haystack begins at a sentence of its own; where the texts end, it goes on at their beginning.
    """

    def __init__(self, path: Path) -> None:
        """Read every format that an upload may have. Raises InvalidRequest where none can be."""
        files = (
            sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        )
        found: list[str] = []
        for file in files:
            try:
                text = read_document(file, file.name).text
            except Unreadable as error:
                raise InvalidRequest(f"{file}: {error}") from error
            except OSError as error:
                raise InvalidRequest(f"cannot read {file}: {error.strerror}") from error
            found += [" ".join(part.split()) for part in _END.split(text) if part.strip()]
        if len(found) < LEAST_SENTENCES:
            raise InvalidRequest(
                f"{path} has {len(found)} sentences; a haystack is made of at least "
                f"{LEAST_SENTENCES}"
            )
        self.sentences = tuple(found)
        self.digest = blake2b("\n".join(found).encode(), digest_size=8).hexdigest()

    def __call__(self, rng: random.Random, count: int) -> Sequence[str]:
        begin = rng.randrange(len(self.sentences))
        return [self.sentences[(begin + number) % len(self.sentences)] for number in range(count)]


def filler(texts: Path | None) -> tuple[Sentences, str]:
    """Return what draws sentences, and a name of the text that tells it from any other."""
    if texts is None:
        return generated_sentences, "generated"
    found = TextFiller(texts)
    return found, f"{texts.name} {found.digest}"

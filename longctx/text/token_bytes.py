"""The bytes that each token of a vocabulary stands for.

`decode` makes text of tokens that belong together. A single token may be a part of a character, so
what it stands for is bytes: three tokens may be needed for one Chinese sign.
"""

import re
from collections.abc import Mapping
from typing import Any

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_MARK = "\u2581"  # stands for a space, where words are marked by what comes before them


def _byte_level() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Printable characters of Latin-1 stand for themselves, the other bytes for those from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(256, 512))
    return {chr(byte if byte in printable else next(shifted)): byte for byte in range(256)}


class TokenBytes:
    """Tells a token's bytes; safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer, state: Mapping[str, Any]) -> None:
        """`state`: the JSON form of `backend`."""
        self._backend = backend
        self._added = {entry["id"]: entry["content"].encode() for entry in state["added_tokens"]}
        decoder = state["decoder"] or {}
        kinds = {step["type"] for step in decoder.get("decoders", [decoder]) if "type" in step}
        self._characters = _byte_level() if "ByteLevel" in kinds else None
        self._marks_words = bool(kinds & {"Metaspace", "ByteFallback", "Replace"})

    def of(self, token_id: int) -> bytes:
        """Return a token's bytes: of a special token its name, of an unknown id none."""
        added: bytes | None = self._added.get(token_id)
        if added is not None:
            return added
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._characters is not None:
            if all(character in self._characters for character in token):
                return bytes(self._characters[character] for character in token)
            return token.encode()
        if self._marks_words:
            byte = _BYTE_TOKEN.fullmatch(token)
            return bytes.fromhex(byte[1]) if byte else token.replace(_WORD_MARK, " ").encode()
        text: str = self._backend.decode([token_id], skip_special_tokens=False)
        return text.encode()

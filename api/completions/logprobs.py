"""Writes log-probabilities as OpenAI does, for chats and for completions.

There is an entry for each token of the answer that `usage` counts, so also for the token that ended
it. A token that is only a part of a character is written as its bytes: `bytes:\\xe4\\xbd`.
"""

import codecs
from collections.abc import Sequence
from typing import Any

from api.http.sse import JSONObject
from longctx.request import TokenLogprob
from longctx.text.tokenizer import Tokenizer

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot write


class ChatLogprobs:
    """Writes the object `logprobs` of a chat's choice, or of a delta of it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def written(self, told: Sequence[TokenLogprob]) -> JSONObject:
        content = [
            {
                **self._entry(one.token_id, one.logprob),
                "top_logprobs": [self._entry(*likely) for likely in one.likeliest],
            }
            for one in told
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float | None) -> JSONObject:
        data = self._tokenizer.token_bytes(token_id)
        return {"token": token_name(data), "logprob": _finite(logprob), "bytes": list(data)}


class CompletionLogprobs:
    """Writes the object `logprobs` of completions, or of their deltas, in order.

    Each choice goes on where its last call ended: `text_offset` counts the characters before.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offsets: dict[int, _Offset] = {}

    def written(self, index: int, told: Sequence[TokenLogprob]) -> JSONObject:
        offset = self._offsets.setdefault(index, _Offset())
        names: list[str] = []
        offsets: list[int] = []
        likeliest: list[dict[str, float] | None] = []
        for one in told:
            data = self._tokenizer.token_bytes(one.token_id)
            names.append(token_name(data))
            special = self._tokenizer.is_special(one.token_id)
            offsets.append(offset.pass_over(b"" if special else data))
            likeliest.append(self._likeliest(one))
        return {
            "tokens": names,
            "token_logprobs": [_finite(one.logprob) for one in told],
            "top_logprobs": likeliest if any(one.likeliest for one in told) else None,
            "text_offset": offsets,
        }

    def _likeliest(self, one: TokenLogprob) -> dict[str, float] | None:
        """Name the likeliest tokens, and the one that is there, which may not be among them."""
        if one.logprob is None:
            return None
        pairs = dict((*one.likeliest, (one.token_id, one.logprob)))
        return {
            token_name(self._tokenizer.token_bytes(token)): max(LOWEST, p)
            for token, p in pairs.items()
        }


class _Offset:
    """Counts the characters of a text whose bytes come token by token."""

    def __init__(self) -> None:
        self._characters = 0
        self._decoder: Any = codecs.getincrementaldecoder("utf-8")("replace")

    def pass_over(self, data: bytes) -> int:
        """Returns where the token of these bytes begins, and counts them."""
        if data and not 0x80 <= data[0] < 0xC0:  # it continues no character: what is open stays so
            self._characters += len(self._decoder.decode(b"", final=True))
        begin = self._characters
        self._characters += len(self._decoder.decode(data))
        return begin


def token_name(data: bytes) -> str:
    """Returns a token's text, or its bytes written out where they are no text by themselves."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(LOWEST, logprob)

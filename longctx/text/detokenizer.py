"""Tokens to text as they come: whole characters only, and nothing that a stop string may swallow.

The text so far always equals what decoding all tokens at once would begin with, but each token
costs a decode of a few tokens, not of the answer. Two windows make it so:

- A character may span several tokens, and what is incomplete decodes to U+FFFD. Only a short
  window of tokens is decoded again: those of the last finished text (what follows may depend
  on them) and those after it. Trailing U+FFFD is kept back until it is final.
- Text that may be the beginning of a stop string is kept back until it is not.
"""

from typing import NamedTuple

from longctx.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_CHARACTER_BYTES = 4  # the longest UTF-8 character: up to three bytes and tokens are unfinished
_WINDOW_TOKENS = 24  # a window this long holds nonsense bytes: it is cut where that changes nothing


class TextDelta(NamedTuple):
    """The text that one more token made certain."""

    text: str
    stopped_by: str | None  # the stop string that ended the text; it is not in the text


class TextStream:
    """The text of one answer, grown token by token with `push` and closed with `finish`.

    One thread uses it. Where several stop strings occur, the one that is complete first ends the
    text, the longest of those that end together. Bytes that are not UTF-8 come out as U+FFFD, as in
    `decode`; after byte-fallback tokens (`<0xE2>`) the number of these may differ from `decode`'s.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, stop: tuple[str, ...], shown: tuple[int, ...] = ()
    ) -> None:
        """`shown`: special tokens that are named in the text; the others are left out."""
        assert all(stop), "an empty stop string would end every text"
        self._tokenizer = tokenizer
        self._stop = stop
        self._shown = shown
        self._stopped_by: str | None = None
        self._held = ""  # final text that may become a stop string
        self._window: list[int] = []  # the tokens that are decoded again
        self._fresh = 0  # where the tokens after the last finished text begin in the window
        self._taken = 0  # characters of the window's text that were final before
        self._cut_at = _WINDOW_TOKENS

    def push(self, token_id: int) -> TextDelta:
        """Add a token and return the text that is certain now; none comes after a stop string."""
        if self._stopped_by is not None:
            return TextDelta("", self._stopped_by)
        if self._tokenizer.is_special(token_id):
            if token_id not in self._shown:
                return TextDelta("", None)
            name = self._tokenizer.token_bytes(token_id).decode()
            return self._release(self._tail() + name)
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        final = self._final_chars(text)
        new = text[self._taken : final]
        self._taken = max(self._taken, final)
        if final == len(text):
            self._window = self._window[self._fresh :]
            self._fresh = len(self._window)
            self._taken = len(self._tokenizer.decode(self._window))
            self._cut_at = _WINDOW_TOKENS
        elif len(self._window) >= self._cut_at:
            self._cut(text)
        return self._release(new)

    def finish(self) -> str:
        """Return what was kept back; an incomplete character comes out as U+FFFD."""
        if self._stopped_by is not None:
            return ""
        text = self._release(self._tail()).text + self._held
        self._held = ""
        return text

    def another(self) -> "TextStream":
        """Return the text of another answer, which begins anew."""
        return TextStream(self._tokenizer, stop=self._stop, shown=self._shown)

    def _tail(self) -> str:
        """Take what is left in the window as it is."""
        tail = self._tokenizer.decode(self._window)[self._taken :]
        self._window, self._fresh, self._taken = [], 0, 0
        return tail

    def _final_chars(self, text: str) -> int:
        """Count the characters of the window's text that later tokens cannot change."""
        if not text.endswith(_REPLACEMENT):
            return len(text)
        if len(self._window) - self._fresh < _CHARACTER_BYTES:  # perhaps one unfinished character
            return self._taken
        tail = text[1 - _CHARACTER_BYTES :]
        return len(text) - len(tail) + len(tail.rstrip(_REPLACEMENT))

    def _cut(self, text: str) -> None:
        """Shorten a window of which no end is a finished text, such as a run of stray bytes."""
        for size in range(len(self._window) - _CHARACTER_BYTES, 0, -1):
            head = self._tokenizer.decode(self._window[:size])
            if len(head) > self._taken:
                continue
            if head + self._tokenizer.decode(self._window[size:]) == text:
                self._window = self._window[size:]
                self._fresh = 0
                self._taken -= len(head)
                return
        self._cut_at = 2 * len(self._window)  # seldom tried, so that a token's share stays small

    def _release(self, new: str) -> TextDelta:
        text = self._held + new
        ends = [
            (begin + len(stop), begin, stop)
            for stop in self._stop
            if (begin := text.find(stop)) >= 0
        ]
        if ends:
            _end, begin, self._stopped_by = min(ends)
            self._held = ""
            return TextDelta(text[:begin], self._stopped_by)
        keep = self._unfinished_stop(text)
        self._held = text[len(text) - keep :]
        return TextDelta(text[: len(text) - keep], None)

    def _unfinished_stop(self, text: str) -> int:
        """Measure the longest end of the text that begins a stop string, in characters."""
        longest = max(map(len, self._stop), default=0)
        for size in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0

"""Text to token ids and back, with one rule: a user's text is text.

`encode` never yields a special token, nor another control token that the chat template marks turns
with, whatever the text says: `</s>` in a file is four characters about markup, not the end of it.
Only template text (`encode_template`) may speak to the model.

Nothing is truncated or cut: on megabytes, also without a single space, the tokenizers library
takes time proportional to the text. Every method may be called from several threads at once.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import tokenizers
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from longctx.errors import InvalidRequest, ModelRefused
from longctx.model.gguf_config import gguf_end_tokens
from longctx.model.gguf_file import find_gguf, read_gguf
from longctx.text.gguf_tokenizer import gguf_tokenizer
from longctx.text.token_bytes import TokenBytes
from longctx.text.tool_forms import find_tool_form

# All that a template's `strftime_now` may ask for, glibc's unpadded forms included.
_DATE_DIRECTIVES = ("%-d", "%-m", *(f"%{letter}" for letter in "aAbBcdDeFGhHIjmMpSTuUVwWxXyYZ"))


class Tokenizer:
    """The tokenizer and chat template of a Hugging Face model folder, or of a GGUF file.

    It is immutable once made: every method may be called from several threads at once. *Special*
    tokens are those that the checkpoint calls so; *control* tokens are these and others that its
    chat template writes by itself.
    """

    def __init__(self, folder: Path) -> None:
        """Reads local files only and runs no code of the folder.

        Raises ModelRefused when there is no tokenizer that can be read.
        """
        found = find_gguf(folder)
        file = None if found is None else read_gguf(found)
        hugging_face = _load(folder) if file is None else gguf_tokenizer(file)
        backend = hugging_face.backend_tokenizer
        backend.no_truncation()  # a checkpoint may carry its training length
        backend.no_padding()
        self._template = _chat_template(hugging_face)
        # Some checkpoints have another one for conversations with tools.
        self._tools_template = _chat_template(hugging_face, tools=[]) or self._template
        names, literal = _template_words(self._template or "")
        tool_names, tool_literal = _template_words(self._tools_template or "")
        self.has_chat_template = self._template is not None
        self.takes_documents = "documents" in names
        self._asks_date = "strftime_now" in names | tool_names

        added = backend.get_added_tokens_decoder()
        special = {token_id: token.content for token_id, token in added.items() if token.special}
        # Some checkpoints do not call the control tokens of their template special.
        control = special | {
            token_id: token.content
            for token_id, token in added.items()
            if token.content in f"{literal}\n{tool_literal}" and not token.content.isspace()
        }
        self.tool_form = find_tool_form(
            self._tools_template or "",
            tool_names,
            {token.content: token_id for token_id, token in added.items() if token.special},
        )
        described: str = backend.to_str()
        state = json.loads(described)
        for entry in state["added_tokens"]:
            entry["special"] = entry["id"] in control
        self._hugging_face = hugging_face
        self._backend = backend
        self._plain = _text_only(state)  # a copy: transformers keeps reading templates
        self._continuing = _text_only(state) if _drop_prefix(state) else self._plain
        self._special_ids = frozenset(special)
        self._special_pattern = _any_of(special.values())
        self._control_pattern = _any_of(control.values())
        # What the vocabulary lacks becomes the unknown token: it is text, though its id is special.
        self._forbidden_ids = frozenset(control) - {_unknown_id(backend, state["model"])}
        self._normalizes = backend.normalizer is not None
        self._before, self._after = _default_frame(self._plain)
        self._bytes = TokenBytes(backend, state)

        self.special_token_strings = frozenset(special.values())
        self.bos_token_id: int | None = hugging_face.bos_token_id
        self.eos_token_ids = (
            _eos_token_ids(folder, hugging_face) if file is None else gguf_end_tokens(file)
        )
        self.vocab_size = 1 + max(backend.get_vocab().values())  # ids lie below it
        # Equal for equal tokens of every text and conversation, and equal ends of answers.
        decides = [self._template, self.bos_token_id, sorted(self.eos_token_ids), sorted(control)]
        self.fingerprint = hashlib.sha256(f"{described}{json.dumps(decides)}".encode()).hexdigest()

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` skips the token."""
        return token_id in self._special_ids

    def spells_special(self, text: str) -> bool:
        """Whether `encode_template` would read a special token in the text."""
        return self._reads(text, self._special_pattern, self._special_ids)

    def spells_control(self, text: str) -> bool:
        """Whether `encode_template` would read a control token in the text."""
        return self._reads(text, self._control_pattern, self._forbidden_ids)

    def _reads(self, text: str, pattern: re.Pattern[str], ids: frozenset[int]) -> bool:
        if pattern.search(text) is not None:
            return True
        # A normalizer may turn other characters into one, as NFKC does with full-width brackets.
        found = _ids(self._backend, text) if self._normalizes else ()
        return not (ids & self._forbidden_ids).isdisjoint(found)

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Encode the text as text: no control token is read in it, none is added.

        `continues` says that other text comes directly before it, so that tokenizers that put a
        space before a text do not. Raises InvalidRequest for text that is not Unicode, and for a
        special token so short that the vocabulary has no other way to write it.
        """
        backend = self._continuing if continues else self._plain
        ids = _ids(backend, text)
        if self._forbidden_ids.isdisjoint(ids):
            return ids
        parts = self._encodings(backend, text)
        return [token_id for _, encoding in parts for token_id in encoding.ids]

    def token_ends(self, text: str) -> NDArray[np.int64]:
        """Tell where each token that `encode` makes of a text ends, in characters; they never fall.

        Tokens that are parts of one character end where it does. It takes as long as `encode`, and
        four times its memory.
        """
        ends: list[int] = []
        begin = 0
        for part, encoding in self._encodings(self._plain, text):
            ends += [begin + end for _, end in encoding.offsets]
            begin += len(part)
        return np.maximum.accumulate(np.array(ends, dtype=np.int64))

    def _encodings(
        self, backend: tokenizers.Tokenizer, text: str
    ) -> Iterator[tuple[str, tokenizers.Encoding]]:
        """Yield a text with its encoding, in parts where a control token would be read in it.

        A model such as Unigram finds `</s>` in its vocabulary by itself: the text is cut inside.
        """
        encoding = backend.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if self._forbidden_ids.isdisjoint(ids):
            yield text, encoding
            return
        spans = (
            span
            for token_id, span in zip(ids, encoding.offsets, strict=True)
            if token_id in self._forbidden_ids
        )
        parts: list[str] = []
        begin = 0
        for low, high in spans:
            if high - low < 2:
                raise InvalidRequest(
                    f"the text holds {text[low:high]!r}, which this model's vocabulary can only "
                    "write as a special token; remove it from the text"
                )
            middle = (low + high) // 2
            parts.append(text[begin:middle])
            begin = middle
        parts.append(text[begin:])
        for number, part in enumerate(parts):
            yield from self._encodings(self._continuing if number else backend, part)

    def encode_template(self, text: str, *, continues: bool = False) -> list[int]:
        """Encode template text: control tokens are recognized, none is added."""
        if not continues or self._continuing is self._plain:
            return _ids(self._backend, text)
        control = self._control_pattern.search(text)
        split = control.start() if control else len(text)  # from there on the usual rules hold
        head = _ids(self._continuing, text[:split]) if split else []
        return head + (_ids(self._backend, text[split:]) if control else [])

    def encode_completion(self, text: str) -> list[int]:
        """Encode the text as text, with what the tokenizer adds by default, such as bos."""
        return [*self._before, *self.encode(text), *self._after]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the tokens' text; special ones and ids outside the vocabulary are skipped."""
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special)
        return text

    def to_json(self) -> str:
        """Return the tokenizer in the form of the tokenizers library."""
        text: str = self._backend.to_str()
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, of a special one its name; of an id that is none, none."""
        return self._bytes.of(token_id)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        documents: Sequence[Mapping[str, str]] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        date: str | None = None,
    ) -> str:
        """Render the conversation as template text, with transformers' sandboxed renderer.

        `date` (YYYY-MM-DD) is what the template takes for today; None is today. Raises
        InvalidRequest with the template's own words when it refuses the conversation.
        """
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template; send the prompt as text to /v1/completions",
                param="messages",
            )
        template = self._template if tools is None else self._tools_template
        assert template is not None
        if date is not None and self._asks_date:
            template = _frozen_clock(date) + template
        try:
            text = self._hugging_face.apply_chat_template(
                [dict(message) for message in messages],
                **self._told_tools(tools),
                documents=None if documents is None else [dict(entry) for entry in documents],
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, RecursionError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        assert isinstance(text, str)
        return text

    def _told_tools(self, tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
        if tools is None or self.tool_form is None:
            return {}
        return {self.tool_form.variable: [dict(tool) for tool in tools]}


def _load(folder: Path) -> Any:
    if not folder.is_dir():
        raise ModelRefused(f"no tokenizer: {folder} is not a folder; give a Hugging Face folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises whatever the broken file made it raise
        reason = str(error).strip().split("\n")[0]
        raise ModelRefused(
            f"cannot read the tokenizer in {folder}: {reason}; "
            "the folder needs tokenizer.json and tokenizer_config.json"
        ) from error
    if not tokenizer.is_fast:
        raise ModelRefused(
            f"the tokenizer in {folder} has no tokenizer.json form; convert it with "
            "transformers' save_pretrained"
        )
    return tokenizer


def _eos_token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Join the tokenizer's own end token with those that `transformers` ends an answer at.

    They are in generation_config.json, such as end-of-turn; a model without that file, or without
    them in it, has them in config.json, in one with several parts in that of the text.
    """
    found = {tokenizer.eos_token_id}
    config = _json_object(folder / "config.json")
    text_config = config.get("text_config")
    for each in (
        _json_object(folder / "generation_config.json"),
        config,
        text_config if isinstance(text_config, dict) else {},
    ):
        listed = each.get("eos_token_id")
        if listed is not None:
            found.update(listed if isinstance(listed, list) else [listed])
            break
    return frozenset(token_id for token_id in found if isinstance(token_id, int))


def _json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; one without entries where there is no file. Raises ModelRefused."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelRefused(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelRefused(f"{path} is not a JSON object")
    return found


def _chat_template(tokenizer: Any, tools: list[Any] | None = None) -> str | None:
    try:
        template: str = tokenizer.get_chat_template(tools=tools)
    except ValueError:  # none, or several without a default
        return None
    return template


def _template_words(template: str) -> tuple[frozenset[str], str]:
    """Find the variables that the template reads, and all text that it may write by itself."""
    names = set()
    literal = []
    previous = ""
    try:
        for _line, kind, value in jinja2.Environment().lex(template):
            if kind == "name" and previous != ".":  # an attribute is no variable
                names.add(value)
            if kind in ("data", "string"):
                literal.append(value)
            if kind != "whitespace":
                previous = value
    except jinja2.TemplateSyntaxError:
        return frozenset(), ""  # `render` reports it to whoever sends messages
    return frozenset(names), "\n".join(literal)


def _frozen_clock(date: str) -> str:
    """Write a template prefix that makes the function strftime_now return one day for ever.

    The renderer lets only plain data in, so the formatted parts of the day are written out.
    """
    day = datetime.datetime.fromisoformat(date)
    replaced = "".join(
        f"|replace({directive!r},{day.strftime(directive)!r})" for directive in _DATE_DIRECTIVES
    )
    # The block eats the line break (trim_blocks): the template keeps its own first line.
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"


def _unknown_id(backend: tokenizers.Tokenizer, model: Mapping[str, Any]) -> int | None:
    if model.get("unk_token"):
        unknown: int | None = backend.token_to_id(model["unk_token"])
        return unknown
    return model.get("unk_id")


def _default_frame(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Find the tokens that the post-processor puts before and after a text."""
    sample = backend.encode("a", add_special_tokens=False).ids
    framed: list[int] = backend.encode("a", add_special_tokens=True).ids
    for begin in range(len(framed)):
        if framed[begin : begin + len(sample)] == sample:
            return framed[:begin], framed[begin + len(sample) :]
    return [], []


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _text_only(state: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Build the tokenizer of a JSON form so that it reads special tokens as text."""
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.encode_special_tokens = True
    return backend


def _drop_prefix(state: dict[str, Any]) -> bool:
    """Drop from a JSON form the space that is put before a text; False if there is none."""
    found = False
    normalizer = state["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    kept = [step for step in steps if step.get("type") != "Prepend"]
    if len(kept) < len(steps):
        state["normalizer"] = {"type": "Sequence", "normalizers": kept}
        found = True
    splitter = state["pre_tokenizer"] or {}
    for step in splitter.get("pretokenizers", [splitter]):
        if step.get("type") == "Metaspace" and step["prepend_scheme"] != "never":
            step["prepend_scheme"] = "never"
            found = True
        if step.get("type") == "ByteLevel" and step["add_prefix_space"]:
            step["add_prefix_space"] = False
            found = True
    return found


def _ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        # The fast form keeps no offsets: it takes a quarter of the memory on a text of megabytes.
        ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
    except TypeError as error:
        raise InvalidRequest(
            "the text holds half of a surrogate pair, which is no character; remove it"
        ) from error
    return ids

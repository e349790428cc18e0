"""Who is asked: the engine in this process, or any server that speaks OpenAI's chat completions.

Both get the same words in one message of the user, and the model's own chat template puts the rest
around them, the one BOS token too. Answers are greedy and end where the model or the limit ends
them.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from longctx.bench.report import Parameter, model_parameters
from longctx.bench.retrieval.variants import LIKELIEST
from longctx.bench.timing import Stopwatch
from longctx.errors import InvalidRequest, LongctxError
from longctx.llm import LLM
from longctx.request import SamplingParams, Segment
from longctx.text.chat_template import ChatPrompts, Message

PROBE = "The road to the old harbour is steep, and every morning the boats come back with fish. "
PROBE_TIMES = 24  # enough for a mean of characters per token


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One answer; what the server did not tell is None."""

    text: str
    finish_reason: str
    prompt_tokens: int | None
    cached_tokens: int | None
    seconds: float
    likeliest: Sequence[Sequence[tuple[int, float]]] = ()  # of each token, where they are compared


class Subject(Protocol):
    """What a benchmark of answers needs."""

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """Name the model and how it is served, as results name it."""

    @property
    def counting(self) -> str:
        """Say how tokens are counted."""

    def count(self, text: str) -> int:
        """Count the tokens of the whole prompt in which the user says this."""

    def ask(self, text: str, max_tokens: int) -> Said:
        """Answer. Raises LongctxError where there is no answer to be had."""


class LocalSubject:
    """The engine in this process."""

    counting = "the model's tokenizer, in its chat template"

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._prompts = ChatPrompts(llm.engine.tokenizer)
        self.parameters: Mapping[str, Parameter] = model_parameters(llm.engine.info)

    def count(self, text: str) -> int:
        return sum(len(segment.token_ids) for segment in self._segments(text))

    def ask(self, text: str, max_tokens: int) -> Said:
        began = time.perf_counter()
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        answer = self._llm.chat([Message("user", (text,))], sampling)
        return Said(
            text=answer.text,
            finish_reason=answer.finish_reason.value,
            prompt_tokens=answer.usage.prompt_tokens,
            cached_tokens=answer.usage.cached_tokens,
            seconds=time.perf_counter() - began,
        )

    def _segments(self, text: str) -> tuple[Segment, ...]:
        return self._prompts.render([Message("user", (text,))])


class CachedSubject(LocalSubject):
    """The same, which has each prompt cold, warm or restored in its cache when it is asked."""

    def __init__(self, llm: LLM, cache: str) -> None:
        """`cache` is one of `CACHES`; what is to be restored must have been read (`read`)."""
        super().__init__(llm)
        self._cache = cache
        self._stopwatch = Stopwatch(llm.engine)
        self._asked = 0

    def read(self, text: str) -> None:
        """Compute a prompt, and leave it in the cache."""
        self._stopwatch.ask(self._segments(text), SamplingParams(max_tokens=1, temperature=0.0))

    def ask(self, text: str, max_tokens: int) -> Said:
        salt = ""
        if self._cache == "cold":
            self._asked += 1
            salt = f"cold {self._asked}"
        elif self._cache == "warm":
            self.read(text)
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, logprobs=LIKELIEST)
        answer = self._stopwatch.ask(self._segments(text), sampling, salt=salt)
        return Said(
            text=answer.text,
            finish_reason=answer.finish_reason.value,
            prompt_tokens=answer.usage.prompt_tokens,
            cached_tokens=answer.usage.cached_tokens,
            seconds=answer.token_seconds[-1],
            likeliest=[each.likeliest for each in answer.logprobs],
        )


class ServerSubject:
    """A server behind a URL, asked for one of its models.

    Its `/tokenize` counts where there is one: vLLM's and longctx's take the messages, llama.cpp's
    the text, to which the frame of the chat template is added. Else one answer's usage tells how
    many characters a token has.
    """

    def __init__(self, base_url: str, key: str | None = None, model: str | None = None) -> None:
        """Find the model and how to count. Raises LongctxError where the server does not answer."""
        self._root = base_url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._model = model or self._first_model()
        self.parameters: Mapping[str, Parameter] = {"model": self._model, "server": self._root}
        self._counts_messages = self._counts_text = False
        self._frame_tokens, self._tokens_per_character = 0, 0.0
        self.counting = self._learn_to_count()

    def count(self, text: str) -> int:
        if self._counts_messages:
            return self._count_messages(text)
        if self._counts_text:
            return self._count_text(text) + self._frame_tokens
        return round(len(text) * self._tokens_per_character) + self._frame_tokens

    def ask(self, text: str, max_tokens: int) -> Said:
        began = time.perf_counter()
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        told = self._post("/v1/chat/completions", body)
        try:
            choice, usage = told["choices"][0], told.get("usage") or {}
            details = usage.get("prompt_tokens_details") or {}
            return Said(
                text=choice["message"].get("content") or "",
                finish_reason=choice.get("finish_reason") or "",
                prompt_tokens=usage.get("prompt_tokens"),
                cached_tokens=details.get("cached_tokens"),
                seconds=time.perf_counter() - began,
            )
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise LongctxError(f"{self._root} gave no chat completion: {error!r}") from error

    def _first_model(self) -> str:
        told = self._send("GET", "/v1/models", None)
        try:
            return str(told["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise InvalidRequest(
                f"{self._root} lists no model; name the one to ask with --ask-model"
            ) from error

    def _learn_to_count(self) -> str:
        text = PROBE * PROBE_TIMES
        try:
            self._count_messages(text)
            self._counts_messages = True
            return "the server's tokenizer, in its chat template"
        except LongctxError:
            pass  # it has no such route, or one that takes something else
        short, long = (self.ask(each, 1).prompt_tokens for each in (PROBE, text))
        if short is None or long is None:
            raise InvalidRequest(f"{self._root} tells no usage, so no tokens can be counted")
        try:
            self._frame_tokens = long - self._count_text(text)
            self._counts_text = True
            return "the server's tokenizer, and its chat template's frame"
        except LongctxError:
            pass
        self._tokens_per_character = (long - short) / (len(text) - len(PROBE))
        self._frame_tokens = max(0, round(short - len(PROBE) * self._tokens_per_character))
        each = 1 / self._tokens_per_character
        return f"estimated, {each:.2f} characters a token: the server has no /tokenize"

    def _count_messages(self, text: str) -> int:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": text}],
            "add_generation_prompt": True,
        }
        told = self._post("/tokenize", body)
        # llama.cpp answers what it does not know with no tokens
        count = told.get("count", 0)
        if not isinstance(count, int) or count < 1:
            raise LongctxError("the route counts no messages")
        return count

    def _count_text(self, text: str) -> int:
        tokens = self._post("/tokenize", {"content": text, "add_special": False}).get("tokens")
        if not isinstance(tokens, list) or not tokens:
            raise LongctxError("the route counts no text")
        return len(tokens)

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._send("POST", path, json.dumps(body).encode())

    def _send(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        url = self._root + path
        request = urllib.request.Request(url, body, self._headers, method=method)
        try:
            # No limit of time: a long prompt takes minutes, and Ctrl-C keeps what was answered
            with urllib.request.urlopen(request) as response:
                told = json.load(response)
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode(errors="replace").strip()
            raise LongctxError(f"{url} answered {error.code}: {said}") from error
        except (OSError, ValueError) as error:
            raise LongctxError(f"{url} cannot be asked: {error}") from error
        if not isinstance(told, dict):
            raise LongctxError(f"{url} answered something other than an object")
        return told

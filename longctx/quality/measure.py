"""Measures codecs against `raw`, teacher-forced: the same tokens through one cache of each.

Two kinds of rows are compared. *Text*: the built-in texts, computed in chunks as any document.
*Own*: what the model goes on to say with raw KV (sampled at temperature 1, asked about the text
where it has a chat template), computed token by token. Only rows that see a sealed block count:
a row's own block is never encoded. Read `measure`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from compress.shape import BLOCK_TOKENS
from longctx.attention.backend import BackendFactory
from longctx.engine.sampler import SamplingError, sample
from longctx.engine.sequence import Sequence as EngineSequence
from longctx.engine_info import Measured
from longctx.errors import InvalidRequest
from longctx.model.loader import LoadedModel
from longctx.quality.damage import SPAN_ROWS, DamageMeter, compare
from longctx.quality.replay import Replay
from longctx.quality.texts import TEXTS, Text
from longctx.request import SamplingParams
from longctx.text.chat_template import ChatPrompts, FilePart, Message
from longctx.text.tokenizer import Tokenizer

RAW: Final = "raw"
CHUNK_TOKENS = 2 * BLOCK_TOKENS
READING_SHARE = 0.6  # of the time limit; the rest is for the answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """How much is computed for `raw` and for each codec, and when to stop if that takes longer."""

    text_tokens: int = 320  # of each text
    own_tokens: int = 32  # after each question
    limit_seconds: float | None = 90.0


def measure(
    model: LoadedModel,
    tokenizer: Tokenizer,
    backend: BackendFactory,
    codecs: Sequence[str],
    *,
    workload: Workload,
    texts: Sequence[Text] = TEXTS,
    seed: int = 0,
) -> dict[str, Measured]:
    """Measure what each of `codecs` does to the model.

    Another `seed` lets the model give other answers. Raises ValueError where a codec cannot hold
    the model's heads.
    """
    began = time.monotonic()
    prompts = list(_prompts(model, tokenizer, workload, texts))
    comparison = _CodecComparison(model, tokenizer, backend, codecs, prompts, workload, seed)

    def late(share: float) -> bool:
        limit = workload.limit_seconds
        return limit is not None and time.monotonic() - began > share * limit

    for prompt in prompts:
        comparison.read(prompt)
        if late(READING_SHARE):
            break
    comparison.answer(lambda: late(1.0))
    seconds = time.monotonic() - began
    return {
        codec: Measured(
            text=comparison.text[codec].damage(),
            own=comparison.own[codec].damage(),
            seconds=seconds,
        )
        for codec in codecs
    }


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A text with a question; `text` are the indices of the tokens that are judged as text."""

    token_ids: tuple[int, ...]
    text: range


def _prompts(
    model: LoadedModel, tokenizer: Tokenizer, workload: Workload, texts: Sequence[Text]
) -> Iterator[_Prompt]:
    """Yield every text with its first question, then with its second.

    In that order each text counts even if time is short. A text is judged once, with its first
    question.
    """
    for number in range(max(len(text.questions) for text in texts)):
        for text in texts:
            if number >= len(text.questions):
                continue
            before, after = frame_of(tokenizer, text, text.questions[number])
            room = model.spec.max_context - workload.own_tokens - len(before) - len(after)
            body = tokenizer.encode(text.body)[: min(workload.text_tokens, room)]
            if room > 0 and body:
                end = len(before) + len(body)
                judged = range(len(before), end if number == 0 else len(before))
                yield _Prompt((*before, *body, *after), judged)


def frame_of(
    tokenizer: Tokenizer, text: Text, question: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens before and after the text, by the chat template if there is one."""
    if tokenizer.has_chat_template:
        message = Message("user", (FilePart(text.title, text.title), question))
        try:
            segments = ChatPrompts(tokenizer).render([message])
        except InvalidRequest:  # the template wants another kind of conversation
            return _plain_frame(tokenizer)
        index = next(i for i, segment in enumerate(segments) if segment.document_id is not None)
        before = [token for segment in segments[:index] for token in segment.token_ids]
        after = [token for segment in segments[index + 1 :] for token in segment.token_ids]
        return tuple(before), tuple(after)
    return _plain_frame(tokenizer)


def _plain_frame(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    bos = tokenizer.bos_token_id
    return () if bos is None else (bos,), ()


class _CodecComparison:
    """The same sequences in one cache of each codec, computed side by side.

    `read` takes prompts, one after the other; `answer` comes once, after them. `text` and `own`
    then have what was measured of each codec.
    """

    def __init__(
        self,
        model: LoadedModel,
        tokenizer: Tokenizer,
        backend: BackendFactory,
        codecs: Sequence[str],
        prompts: Sequence[_Prompt],
        workload: Workload,
        seed: int,
    ) -> None:
        self._seed = seed
        self._own_tokens = workload.own_tokens
        self._eos = tokenizer.eos_token_ids
        self._caches = {
            codec: Replay(
                model,
                tokenizer,
                backend,
                codec=codec,
                blocks=_blocks(prompts, workload.own_tokens),
                sequences=max(1, len(prompts)),
                chunk_tokens=CHUNK_TOKENS,
            )
            for codec in (RAW, *codecs)
        }
        self._coded = tuple(codecs)
        self._replays: list[_PromptReplay] = []
        self.text = {codec: DamageMeter() for codec in codecs}
        self.own = {codec: DamageMeter() for codec in codecs}

    def read(self, prompt: _Prompt) -> None:
        """Compute a prompt chunk by chunk in every cache, and compare the rows of its text."""
        sampling = SamplingParams(
            max_tokens=self._own_tokens, temperature=1.0, seed=self._seed + len(self._replays)
        )
        replay = _PromptReplay(
            {
                codec: cache.admit(prompt.token_ids, sampling)
                for codec, cache in self._caches.items()
            }
        )
        while (remaining := replay.raw.blocks.remaining) > 0:
            first = replay.raw.blocks.computed
            count = min(remaining, CHUNK_TOKENS - first % BLOCK_TOKENS)
            logits = self._feed([replay], count)
            judged = range(
                max(first, prompt.text.start, BLOCK_TOKENS),
                min(first + count, prompt.text.stop - 1),
            )
            if judged:
                rows = slice(judged.start - first, judged.stop - first)
                targets = prompt.token_ids[judged.start + 1 : judged.stop + 1]
                for codec in self._coded:
                    self.text[codec].add(_compare(logits[RAW][rows], logits[codec][rows], targets))
            replay.last = {codec: each[-1:] for codec, each in logits.items()}
        self._replays.append(replay)

    def answer(self, late: Callable[[], bool]) -> None:
        """Let the model answer with raw KV while the other caches compute what it says.

        Stops where `late()` says so, but not before there is enough for an interval.
        """
        replays = self._replays
        for step in range(self._own_tokens):
            enough = step * len(self._replays) >= 2 * SPAN_ROWS  # for an interval
            if not replays or (enough and late()):
                break
            raw = torch.cat([replay.last[RAW] for replay in replays])
            sampled = sample(raw, [replay.raw.sampling_state for replay in replays])
            tokens = [_token(draw) for draw in sampled]
            for codec in self._coded:
                coded = torch.cat([replay.last[codec] for replay in replays])
                rows = _compare(raw, coded, tokens)
                for replay, row in zip(replays, rows[:, None].unbind(), strict=True):
                    if replay.raw.blocks.computed > BLOCK_TOKENS:
                        replay.own.setdefault(codec, []).append(row)
            for replay, token in zip(replays, tokens, strict=True):
                replay.append(token)
            replays = [
                replay
                for replay, token in zip(replays, tokens, strict=True)
                if token not in self._eos
            ]
            if replays and step + 1 < self._own_tokens:
                logits = self._feed(replays, 1)
                for index, replay in enumerate(replays):
                    replay.last = {codec: each[index : index + 1] for codec, each in logits.items()}
        for replay in self._replays:
            for codec, spoken in replay.own.items():
                self.own[codec].add(torch.cat(spoken))

    def _feed(self, replays: "Sequence[_PromptReplay]", count: int) -> dict[str, Tensor]:
        return {
            codec: cache.feed([replay.sequences[codec] for replay in replays], count)
            for codec, cache in self._caches.items()
        }


class _PromptReplay:
    """One prompt and its answer: the same tokens as a sequence in the cache of each codec."""

    def __init__(self, sequences: dict[str, EngineSequence]) -> None:
        self.sequences = sequences
        self.raw = sequences[RAW]
        self.last: dict[str, Tensor] = {}  # logits [1, vocab] after the latest token
        self.own: dict[str, list[Tensor]] = {}

    def append(self, token: int) -> None:
        """Append a token that was sampled with raw KV to every codec's sequence."""
        self.raw.sampling_state.observe(token)
        for sequence in self.sequences.values():
            sequence.blocks.tokens.append(token)


def _blocks(prompts: Sequence[_Prompt], own_tokens: int) -> int:
    """Return enough blocks for all sequences; those that two prompts share are left over."""
    return sum((len(prompt.token_ids) + own_tokens) // BLOCK_TOKENS + 2 for prompt in prompts)


def _compare(raw: Tensor, coded: Tensor, targets: Sequence[int]) -> Tensor:
    return compare(raw, coded, torch.tensor(targets, device=raw.device))


def _token(draw: int | SamplingError) -> int:
    if isinstance(draw, SamplingError):
        raise draw
    return draw

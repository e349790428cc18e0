"""Measures codecs against `raw`, and weights against exact ones: the same tokens through each.

Two kinds of rows are compared. *Text*: the built-in texts, computed in chunks as any document.
*Own*: what the model goes on to say in the exact pass (sampled at temperature 1, asked about the
text where it has a chat template), read as any text by the others: so the rows are the same
whatever type serves. Only rows that see a sealed block
count: a row's own block is never encoded.

A type of 16 bits has a noise of its own, larger than what int8 does: two bfloat16 computations of
the same thing differ by more than the limits of a lossless codec. So there is a third pass, in
float32 with raw KV, and what counts is how much farther from it the codec is than `raw` in the
type that serves. One such pass serves all codecs.

It goes in stages: the first reads the beginning of each text and asks the first question, the
second reads on and asks the second one, and then every question is asked again, for other answers.
Who is content after a stage is spared the next: answers are what an interval lacks, and few codecs
need more than the first. Read `measure`.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from compress.shape import BLOCK_TOKENS
from longctx.attention.backend import BackendFactory
from longctx.engine.sequence import Sequence as EngineSequence
from longctx.engine_info import Measured
from longctx.errors import InvalidRequest
from longctx.model.exact import exact_twin
from longctx.model.loader import LoadedModel
from longctx.quality.answers import Answer, draw_answers
from longctx.quality.damage import SPAN_ROWS, DamageMeter, compare
from longctx.quality.replay import Replay
from longctx.quality.texts import TEXTS, Text
from longctx.text.chat_template import ChatPrompts, FilePart, Message
from longctx.text.tokenizer import Tokenizer

RAW: Final = "raw"
CHUNK_TOKENS = 4 * BLOCK_TOKENS
READING_SHARE = 0.6  # of the time limit; the rest is for the answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """How much is computed by each, and when to stop if that takes longer.

    There is a stage for each number of `text_tokens`. The first stages are part of the last. Then
    there are `more_answers` stages that read nothing new.
    """

    text_tokens: tuple[int, ...] = (192, 320)  # of each text, until its first and second question
    own_tokens: int = 32  # after each question
    more_answers: int = 3  # to each question
    limit_seconds: float | None = 90.0


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compute the same tokens: a model, and the codec of its KV."""

    model: LoadedModel
    codec: str = RAW


def measure(
    model: LoadedModel,
    tokenizer: Tokenizer,
    backend: BackendFactory,
    codecs: Sequence[str],
    *,
    workload: Workload,
    texts: Sequence[Text] = TEXTS,
    seed: int = 0,
    content: Callable[[Mapping[str, Measured]], bool] = lambda _: False,
    on_text: Callable[[int, int], None] = lambda _done, _most: None,
) -> dict[str, Measured]:
    """Measure what each of `codecs` does to the model; as `measure_variants`."""
    return measure_variants(
        Variant(exact_twin(model)),
        Variant(model),
        {codec: Variant(model, codec) for codec in codecs},
        tokenizer,
        backend,
        workload=workload,
        texts=texts,
        seed=seed,
        content=content,
        on_text=on_text,
    )


def measure_variants(
    exact: Variant,
    served: Variant,
    changed: Mapping[str, Variant],
    tokenizer: Tokenizer,
    backend: BackendFactory,
    *,
    workload: Workload,
    texts: Sequence[Text] = TEXTS,
    seed: int = 0,
    content: Callable[[Mapping[str, Measured]], bool] = lambda _: False,
    on_text: Callable[[int, int], None] = lambda _done, _most: None,
) -> dict[str, Measured]:
    """Measure how much farther from `exact` each of `changed` is than `served`.

    After each stage `content` says whether what was measured so far is enough. `on_text` is told
    how many texts were read, of how many at most. Another `seed` lets the model give other answers.
    Raises ValueError where a codec cannot hold the model's heads.
    """
    began = time.monotonic()
    stages = [list(each) for each in _stages(served.model, tokenizer, workload, texts)]
    prompts = [prompt for stage in stages for prompt in stage]
    comparison = _Comparison(exact, served, changed, tokenizer, backend, prompts, workload, seed)
    found: dict[str, Measured] = {}
    done = 0

    def late(share: float) -> bool:
        limit = workload.limit_seconds
        return limit is not None and time.monotonic() - began > share * limit

    for stage in stages:
        for prompt in stage:
            comparison.read(prompt)
            done += 1
            on_text(done, len(prompts))
            if late(READING_SHARE):
                break
        comparison.answer(lambda: late(1.0))
        found = comparison.measured(time.monotonic() - began)
        if late(READING_SHARE) or content(found):
            return found
    for _ in range(workload.more_answers):
        comparison.ask_again()
        comparison.answer(lambda: late(1.0))
        found = comparison.measured(time.monotonic() - began)
        if late(READING_SHARE) or content(found):
            break
    return found or comparison.measured(time.monotonic() - began)


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A text with a question; `text` are the indices of the tokens that are judged as text."""

    token_ids: tuple[int, ...]
    text: range
    text_end: int


def _stages(
    model: LoadedModel, tokenizer: Tokenizer, workload: Workload, texts: Sequence[Text]
) -> Iterator[Iterator[_Prompt]]:
    """Yield the prompts of each stage: every text with one question."""
    for number in range(len(workload.text_tokens)):
        yield _prompts(model, tokenizer, workload, texts, number)


def _prompts(
    model: LoadedModel,
    tokenizer: Tokenizer,
    workload: Workload,
    texts: Sequence[Text],
    number: int,
) -> Iterator[_Prompt]:
    """Yield every text with its question `number`; what an earlier stage judged is not judged."""
    for text in texts:
        if number >= len(text.questions):
            continue
        before, after = frame_of(tokenizer, text, text.questions[number])
        room = model.spec.max_context - workload.own_tokens - len(before) - len(after)
        whole = tokenizer.encode(text.body)
        body = whole[: max(0, min(workload.text_tokens[number], room))]
        known = whole[: max(0, min(workload.text_tokens[number - 1], room))] if number else []
        if body:
            end = len(before) + len(body)
            begin = len(before) + max(0, len(known) - 1)  # the last one had nothing to be judged by
            yield _Prompt((*before, *body, *after), range(begin, end), end)


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


class _Comparison:
    """The same sequences computed in several ways, each with a cache of its own.

    In each stage `read` takes prompts, one after the other, or `ask_again` all that were read, and
    then `answer` comes once. All read a text before the next one is read, so the logits of one text
    are in memory at a time.
    """

    def __init__(
        self,
        exact: Variant,
        served: Variant,
        changed: Mapping[str, Variant],
        tokenizer: Tokenizer,
        backend: BackendFactory,
        prompts: Sequence[_Prompt],
        workload: Workload,
        seed: int,
    ) -> None:
        self._seed = seed
        self._own_tokens = workload.own_tokens
        self._eos = tokenizer.eos_token_ids

        # An answer is drawn by a sequence of its own, which reads from the last sealed block on
        tails = sum(_tail(prompt, workload.own_tokens) + BLOCK_TOKENS for prompt in prompts)

        def cache(variant: Variant) -> Replay:
            return Replay(
                variant.model,
                tokenizer,
                backend,
                codec=variant.codec,
                blocks=_blocks(prompts, workload),
                sequences=(2 + workload.more_answers) * max(1, len(prompts)),
                chunk_tokens=CHUNK_TOKENS + tails,
            )

        self._served = cache(served)
        # Where float32 serves, the exact pass is `served` itself
        self._exact = None if exact == served else cache(exact)
        self._changed = {name: cache(variant) for name, variant in changed.items()}
        self._replays: list[_PromptReplay] = []
        self._answered = 0  # of these replays
        self._read: list[_Prompt] = []
        self._text = {name: DamageMeter() for name in changed}
        self._own = {name: DamageMeter() for name in changed}

    def measured(self, seconds: float) -> dict[str, Measured]:
        """Return what was measured until now, which took so many seconds."""
        return {
            name: Measured(
                text=self._text[name].damage(), own=self._own[name].damage(), seconds=seconds
            )
            for name in self._changed
        }

    def read(self, prompt: _Prompt) -> None:
        """Compute the text of a prompt chunk by chunk in every way, and compare its rows."""
        replay = self._admitted(prompt)
        while (first := replay.served.blocks.computed) < prompt.text_end:
            count = min(prompt.text_end - first, CHUNK_TOKENS - first % BLOCK_TOKENS)
            # The last token of the text has nothing to be judged by
            end = min(first + count, prompt.text.stop - 1)
            judged = range(max(first, prompt.text.start, BLOCK_TOKENS), end)
            kept = first + count - judged.start if judged else 0
            rows = slice(0, len(judged))
            targets = prompt.token_ids[judged.start + 1 : judged.stop + 1]
            (served,) = self._served.feed([(replay.served, count)], [kept])
            exact = None
            if self._exact is not None and replay.exact is not None:
                (exact,) = self._exact.feed([(replay.exact, count)], [kept])
            for name, cache in self._changed.items():
                (changed,) = cache.feed([(replay.changed[name], count)], [kept])
                if judged:
                    of_exact = None if exact is None else exact[rows]
                    self._text[name].add(_compare(served[rows], changed[rows], targets, of_exact))
        self._replays.append(replay)
        self._read.append(prompt)

    def ask_again(self) -> None:
        """Ask the question of every prompt that was read for another answer."""
        self._replays += map(self._admitted, self._read)

    def answer(self, late: Callable[[], bool]) -> None:
        """Let the exact pass answer the prompts that were read; then all others read it.

        Stops where `late()` says so, but not before there is enough for an interval.
        """
        replays = self._replays[self._answered :]
        answers = [
            Answer(replay.prompt.token_ids, self._own_tokens, seed=self._seed + number)
            for number, replay in enumerate(replays, self._answered)
        ]
        self._answered = len(self._replays)
        draw_answers(
            answers,
            self._exact or self._served,
            None if self._exact is None else self._served,
            eos=self._eos,
            enough=lambda tokens: tokens >= 2 * SPAN_ROWS and late(),  # enough for an interval
        )
        for replay, answer in zip(replays, answers, strict=True):
            if not answer.spoken:
                continue
            # A row for each token that was said: the last one is judged by, and not computed
            said = (*replay.prompt.token_ids[replay.prompt.text_end :], *answer.spoken[:-1])
            rows = len(answer.spoken)
            first = len(replay.prompt.token_ids) - 1
            skipped = max(0, BLOCK_TOKENS - first)  # rows that see no sealed block
            if skipped >= rows:
                continue
            served, exact = torch.cat(answer.rows)[skipped:], None
            answer.rows.clear()
            if self._exact is not None:
                exact = served
                served = _read_on(self._served, replay.served, said, rows)[skipped:]
            for name, cache in self._changed.items():
                changed = _read_on(cache, replay.changed[name], said, rows)[skipped:]
                targets = answer.spoken[skipped:]
                self._own[name].add(_compare(served, changed, targets, exact))

    def _admitted(self, prompt: _Prompt) -> "_PromptReplay":
        """Take a prompt's text in every way. One that was read before is found, block by block."""
        text = prompt.token_ids[: prompt.text_end]
        return _PromptReplay(
            prompt,
            served=self._served.admit(text),
            exact=None if self._exact is None else self._exact.admit(text),
            changed={name: cache.admit(text) for name, cache in self._changed.items()},
        )


@dataclass(slots=True)
class _PromptReplay:
    """One prompt and its answer: the same tokens as a sequence in each cache."""

    prompt: _Prompt
    served: EngineSequence
    exact: EngineSequence | None
    changed: dict[str, EngineSequence]


def _read_on(cache: Replay, sequence: EngineSequence, said: Sequence[int], rows: int) -> Tensor:
    """Let a cache read the question and what was said to it; return the last rows' logits."""
    for token in said:
        sequence.blocks.tokens.append(token)
    (logits,) = cache.feed([(sequence, sequence.blocks.remaining)], [rows])
    return logits


def _blocks(prompts: Sequence[_Prompt], workload: Workload) -> int:
    """Return enough blocks for all sequences; those that two prompts share are left over."""
    own_tokens = workload.own_tokens
    return sum(
        (len(prompt.token_ids) + own_tokens) // BLOCK_TOKENS
        + (1 + workload.more_answers) * (_tail(prompt, own_tokens) // BLOCK_TOKENS + 4)
        for prompt in prompts
    )


def _tail(prompt: _Prompt, own_tokens: int) -> int:
    """Return the tokens that follow the text: the question and its answer."""
    return len(prompt.token_ids) - prompt.text_end + own_tokens


def _compare(
    served: Tensor, changed: Tensor, targets: Sequence[int], exact: Tensor | None
) -> Tensor:
    return compare(served, changed, torch.tensor(targets, device=served.device), exact=exact)

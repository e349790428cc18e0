"""Needles in haystacks: does the engine still find one sentence in a long document, at any depth?

Each document is read once and then asked once per needle, through the cache that serves users, so
what a codec or a reused prefix breaks shows here. An answer counts when it is the whole value,
character for character. Keys and values are words that training never draws. Read `_Run`.
Source: Greg Kamradt, https://github.com/gkamradt/LLMTest_NeedleInAHaystack
Differs: many needles per document (one question each), exact match instead of a judge.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from longctx.bench.config import BenchConfig, FillerConfig, NiahConfig, VariantsConfig
from longctx.bench.haystack import Haystack, Planted, haystacks
from longctx.bench.report import Parameter, Report
from longctx.bench.restart import drop_from_memory, opened
from longctx.bench.retrieval.grid import Grid, Place, Reading
from longctx.bench.retrieval.journal import Journal
from longctx.bench.retrieval.niah_report import draw, results, tables
from longctx.bench.retrieval.texts import filler
from longctx.bench.retrieval.variants import LIKELIEST, Variant, stored, told_logprobs
from longctx.bench.scores import matches
from longctx.bench.timing import Stopwatch
from longctx.config import EngineConfig
from longctx.llm import LLM
from longctx.needles.ruler_tasks import Sentences, generated_sentences
from longctx.request import SamplingParams
from longctx.text.chat_template import ChatPrompts, FilePart, Message

READ = -1  # in the place of a question: what reading the document took


def run(
    engine: EngineConfig,
    bench: BenchConfig,
    texts: FillerConfig,
    variants: VariantsConfig,
    niah: NiahConfig,
    *,
    say: Callable[[str], None],
) -> Report:
    """Asks every question of the grid, of each codec and cache. Raises LongctxError."""
    sentences, text_name = filler(texts.haystack)
    asked: dict[str, Parameter] = {
        "model": "embedded" if engine.model.model is None else str(engine.model.model),
        "dtype": engine.model.dtype,
        "kv_codec": engine.cache.kv_codec,
        **asdict(variants),
        **asdict(niah),
        "haystack": text_name,
        "seed": bench.seed,
    }
    journal = Journal(bench.out, "niah", asked)
    try:
        if journal.records:
            say(f"{len(journal.records)} answers and readings are there already")
        whole = _Run(engine, variants, niah, bench.seed, sentences, journal, say)
        whole.ask_all()
        journal.finish()
    finally:
        journal.close()
    parameters: dict[str, Parameter] = {
        **whole.parameters,
        "kind": niah.kind,
        "haystack": text_name,
    }
    grids = {variant: _grid(journal, variant) for variant in whole.variants}
    subtitle = f"{parameters['model']}, {niah.kind} needles in {text_name} text"
    return Report(
        results=tuple(results(grids, niah, parameters)),
        tables=tuple(tables(grids, niah, subtitle)),
        draw=partial(draw, grids, niah, subtitle),
    )


class _Run:
    """Opens an engine for each codec, and another one over the same files for what is restored."""

    def __init__(
        self,
        engine: EngineConfig,
        variants: VariantsConfig,
        niah: NiahConfig,
        seed: int,
        sentences: Sentences,
        journal: Journal,
        say: Callable[[str], None],
    ) -> None:
        self._engine, self._niah, self._seed, self._say = engine, niah, seed, say
        self._compared = variants
        self._sentences = None if sentences is generated_sentences else sentences
        self._journal = journal
        self.variants: list[Variant] = []
        self.parameters: dict[str, Parameter] = {}

    def ask_all(self) -> None:
        lengths = self._niah.token_lengths
        for named in self._compared.every_codec or (None,):
            with stored(self._engine, self._compared, named) as config:
                with opened(config) as llm:
                    asking = self._asking(llm)
                    hays = {length: self._haystacks(llm, length) for length in lengths}
                    for length in lengths:
                        for place, hay in hays[length]:
                            asking.before_restart(place, hay)
                        for cache in self._compared.every_cache:
                            if cache != "restored":
                                self._tell(Variant(asking.codec, cache), length)
                if "restored" not in self._compared.every_cache:
                    continue
                assert config.cache.kv_dir is not None
                drop_from_memory(sorted(config.cache.kv_dir.rglob("*.kv")))
                with opened(config) as llm:
                    asking = _Asking(llm, self._compared, self._niah, self._journal)
                    for length in lengths:
                        for place, hay in hays[length]:
                            asking.after_restart(place, hay)
                        self._tell(Variant(asking.codec, "restored"), length)

    def _asking(self, llm: LLM) -> "_Asking":
        asking = _Asking(llm, self._compared, self._niah, self._journal)
        info = llm.engine.info
        self.parameters = {"model": info.model_name, "dtype": info.dtype, "device": info.device}
        self.variants += [Variant(asking.codec, cache) for cache in self._compared.every_cache]
        return asking

    def _haystacks(self, llm: LLM, length: int) -> list[tuple[tuple[int, int, int], Haystack]]:
        niah = self._niah
        return [
            ((length, seed, number), hay)
            for seed in range(self._seed, self._seed + niah.seeds)
            for number, hay in enumerate(
                haystacks(
                    length,
                    niah.percent_depths,
                    questions=niah.questions,
                    kind=niah.kind,
                    distractor_count=niah.distractors,
                    seed=seed,
                    tokenizer=llm.engine.tokenizer,
                    sentences=self._sentences,
                )
            )
        ]

    def _tell(self, variant: Variant, length: int) -> None:
        grid = _grid(self._journal, variant)
        cell = grid.cell(length)
        self._say(f"{variant}, {length:,} tokens: {cell.right} of {cell.asked} found")
        found, of = sum(grid.readings[length].found_tokens), grid.readings[length].tokens
        if variant.cache == "restored" and found < of / 2:
            self._say(f"only {found:,} of {of:,} tokens came from the disk; the rest was computed")


class _Asking:
    """Asks one engine about documents; what the journal has already is not asked again."""

    def __init__(
        self, llm: LLM, variants: VariantsConfig, niah: NiahConfig, journal: Journal
    ) -> None:
        self._llm, self._niah, self._journal = llm, niah, journal
        self._caches, self._compared = variants.every_cache, variants.several
        self._prompts = ChatPrompts(llm.engine.tokenizer)
        self._stopwatch = Stopwatch(llm.engine)
        self.codec: str = llm.engine.info.kv_codec

    def before_restart(self, place: tuple[int, int, int], hay: Haystack) -> None:
        """Ask with nothing computed, then read the document and ask again."""
        missing = {cache: self._missing(cache, place, hay) for cache in self._caches}
        for number, planted in missing.get("cold", ()):
            self._ask_cold("cold", (*place, number), hay, planted)
        if missing.get("warm") or missing.get("restored"):
            self._ask_read("warm", place, hay, missing.get("warm", []))

    def after_restart(self, place: tuple[int, int, int], hay: Haystack) -> None:
        """Ask about what another engine has left on the disk."""
        if missing := self._missing("restored", place, hay):
            self._ask_read("restored", place, hay, missing)

    def _missing(
        self, cache: str, place: tuple[int, int, int], hay: Haystack
    ) -> list[tuple[int, Planted]]:
        return [
            (number, planted)
            for number, planted in enumerate(hay.planted)
            if (self.codec, cache, *place, number) not in self._journal.records
        ]

    def _ask_cold(self, cache: str, place: Place, hay: Haystack, planted: Planted) -> None:
        """Ask while the document is unknown; what was computed for it is erased."""
        engine = self._llm.engine
        token_ids = engine.tokenizer.encode(hay.text)
        engine.open_document(cache, np.array(token_ids, dtype=np.int32))
        self._ask(cache, place, FilePart(cache, "document"), planted)
        self._llm.close_document(cache)

    def _ask_read(
        self,
        cache: str,
        place: tuple[int, int, int],
        hay: Haystack,
        missing: list[tuple[int, Planted]],
    ) -> None:
        began = time.perf_counter()
        document = self._llm.document_from_text(hay.text)
        read = {
            "seconds": time.perf_counter() - began,
            "tokens": document.tokens,
            "cached_tokens": document.usage.cached_tokens,
        }
        if missing:
            self._journal.add((self.codec, cache, *place, READ), read)
        part = FilePart(document.part.document_id, document.part.title)
        for number, planted in missing:
            self._ask(cache, (*place, number), part, planted)
        if cache == "restored" or "restored" not in self._caches:
            document.close()

    def _ask(self, cache: str, place: Place, part: FilePart, planted: Planted) -> None:
        began = time.perf_counter()
        segments = self._prompts.render([Message("user", (part, planted.needle.question))])
        rendered = time.perf_counter() - began
        sampling = SamplingParams(
            max_tokens=self._niah.answer_tokens,
            temperature=0.0,
            logprobs=LIKELIEST if self._compared else None,
        )
        answer = self._stopwatch.ask(segments, sampling)
        record: dict[str, Any] = {
            "depth": planted.depth,
            "begin_token": planted.begin_token,
            "wanted_token": planted.wanted_token,
            "right": matches(answer.text, planted.needle.answer, self._niah.match),
            "question": planted.needle.question,
            "wanted": planted.needle.answer,
            "given": answer.text,
            "cached_tokens": answer.usage.cached_tokens,
            # Each token of the answer but the last is computed too, to draw the next one
            "computed_tokens": answer.usage.computed_tokens - answer.usage.completion_tokens + 1,
            "first_token_seconds": rendered + answer.first_token_seconds,
            "likeliest": told_logprobs(token.likeliest for token in answer.logprobs),
        }
        self._journal.add((self.codec, cache, *place), record)


def _grid(journal: Journal, variant: Variant) -> Grid:
    answers: dict[Place, Mapping[str, Any]] = {}
    readings: dict[int, Reading] = {}
    for (codec, cache, *rest), record in journal.records.items():
        if (codec, cache) != (variant.codec, variant.cache):
            continue
        length, seed, document, question = (int(part) for part in rest)
        reading = readings.setdefault(length, Reading())
        if question == READ:
            reading.documents += 1
            reading.tokens += record["tokens"]
            reading.seconds += record["seconds"]
            reading.found_tokens.append(record["cached_tokens"])
        else:
            answers[length, seed, document, question] = record
            reading.cached_tokens.append(record["cached_tokens"])
            reading.computed_tokens.append(record["computed_tokens"])
            reading.first_token_seconds.append(record["first_token_seconds"])
    return Grid(answers, readings)

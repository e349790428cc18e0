"""Needles in haystacks: does the engine still find one sentence in a long document, at any depth?

Each document is read once and then asked once per needle, through the cache that serves users, so
what a codec or a reused prefix breaks shows here. An answer counts when it is the whole value,
character for character. Keys and values are words that training never draws. Read `_Run`.
Source: Greg Kamradt, https://github.com/gkamradt/LLMTest_NeedleInAHaystack
Differs: many needles per document (one question each), exact match instead of a judge.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from longctx.bench.config import (
    BenchConfig,
    FillerConfig,
    LevelsConfig,
    NiahConfig,
    VariantsConfig,
)
from longctx.bench.haystack import Haystack, haystacks
from longctx.bench.report import Parameter, Report
from longctx.bench.restart import drop_from_memory, opened
from longctx.bench.retrieval.asking import READ, Asking
from longctx.bench.retrieval.grid import Grid, Place, Reading
from longctx.bench.retrieval.journal import Journal
from longctx.bench.retrieval.niah_report import draw, results, tables
from longctx.bench.retrieval.texts import filler
from longctx.bench.retrieval.variants import Variant, stored
from longctx.config import EngineConfig
from longctx.llm import LLM
from longctx.needles.ruler_tasks import Sentences, generated_sentences


def run(
    engine: EngineConfig,
    bench: BenchConfig,
    texts: FillerConfig,
    variants: VariantsConfig,
    levels: LevelsConfig,
    niah: NiahConfig,
    *,
    say: Callable[[str], None],
) -> Report:
    """Asks every question of the grid, in each way. Raises LongctxError."""
    sentences, text_name = filler(texts.haystack)
    asked: dict[str, Parameter] = {
        "model": "embedded" if engine.model.model is None else str(engine.model.model),
        "dtype": engine.model.dtype,
        "kv_codec": engine.cache.kv_codec,
        **asdict(variants),
        **asdict(levels),
        **asdict(niah),
        "haystack": text_name,
        "seed": bench.seed,
    }
    journal = Journal(bench.out, "niah", asked)
    try:
        if journal.records:
            say(f"{len(journal.records)} answers and readings are there already")
        whole = _Run(engine, variants, levels, niah, bench.seed, sentences, journal, say)
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
        levels: LevelsConfig,
        niah: NiahConfig,
        seed: int,
        sentences: Sentences,
        journal: Journal,
        say: Callable[[str], None],
    ) -> None:
        self._engine, self._niah, self._seed, self._say = engine, niah, seed, say
        self._compared, self._levels = variants, levels
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
                        for variant in asking.variants:
                            if variant.cache != "restored":
                                self._tell(variant, length)
                if "restored" not in self._compared.every_cache:
                    continue
                assert config.cache.kv_dir is not None
                drop_from_memory(sorted(config.cache.kv_dir.rglob("*.kv")))
                with opened(config) as llm:
                    asking = Asking(llm, self._compared, self._levels, self._niah, self._journal)
                    for length in lengths:
                        for place, hay in hays[length]:
                            asking.after_restart(place, hay)
                        for variant in asking.variants:
                            if variant.cache == "restored":
                                self._tell(variant, length)

    def _asking(self, llm: LLM) -> Asking:
        asking = Asking(llm, self._compared, self._levels, self._niah, self._journal)
        info = llm.engine.info
        self.parameters = {"model": info.model_name, "dtype": info.dtype, "device": info.device}
        self.variants += asking.variants
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


def _grid(journal: Journal, variant: Variant) -> Grid:
    answers: dict[Place, Mapping[str, Any]] = {}
    readings: dict[int, Reading] = {}
    for (codec, cache, level, *rest), record in journal.records.items():
        if (codec, cache, level) != variant.key:
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

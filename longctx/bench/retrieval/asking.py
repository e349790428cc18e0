"""Asks one engine about haystacks, in every way that is compared; each answer is kept at once."""

import time
from typing import Any

from longctx.bench.config import LevelsConfig, NiahConfig, VariantsConfig
from longctx.bench.haystack import Haystack, Planted
from longctx.bench.retrieval.grid import Place
from longctx.bench.retrieval.held import Held, HeldDocument, HeldModules
from longctx.bench.retrieval.journal import Journal
from longctx.bench.retrieval.variants import LIKELIEST, Variant, told_logprobs
from longctx.bench.timing import Stopwatch
from longctx.llm import LLM
from longctx.needles.scores import matches
from longctx.request import SamplingParams
from longctx.text.chat_template import ChatPrompts
from prompt_cache.level import EXACT, Level

READ = -1  # in the place of a question: what reading the document took


class Asking:
    """Asks one engine about documents; what the journal has already is not asked again."""

    def __init__(
        self,
        llm: LLM,
        variants: VariantsConfig,
        levels: LevelsConfig,
        niah: NiahConfig,
        journal: Journal,
    ) -> None:
        self._llm, self._niah, self._journal = llm, niah, journal
        self._caches = variants.every_cache
        self._prompts = ChatPrompts(llm.engine.tokenizer)
        self._stopwatch = Stopwatch(llm.engine)
        self._levels: dict[str, Level | None] = {"": None}
        if levels.every_level:
            self._levels = {each.name: each for each in (EXACT, *levels.every_level)}
        self._compared = variants.several or len(self._levels) > 1
        codec = llm.engine.info.kv_codec
        self.variants = [
            Variant(codec, cache, level) for cache in self._caches for level in self._levels
        ]

    def before_restart(self, place: tuple[int, int, int], hay: Haystack) -> None:
        """Ask with nothing computed, then read the document and ask again."""
        missing = {each: self._missing(each, place, hay) for each in self.variants}
        for variant in self.variants:
            if variant.cache == "cold":
                for number, planted in missing[variant]:
                    self._ask_cold(variant, (*place, number), hay, planted)
            elif variant.cache == "warm":
                restored = missing.get(Variant(variant.codec, "restored", variant.level))
                if missing[variant] or restored:
                    held = self._ask_read(variant, place, hay, missing[variant])
                    if "restored" not in self._caches:
                        held.close()
            elif missing[variant] and "warm" not in self._caches:
                read_by = Variant(variant.codec, "warm", variant.level)
                self._ask_read(read_by, place, hay, [])

    def after_restart(self, place: tuple[int, int, int], hay: Haystack) -> None:
        """Ask about what another engine has left on the disk."""
        held: Held | None = None
        for variant in self.variants:
            if variant.cache == "restored" and (missing := self._missing(variant, place, hay)):
                held = self._ask_read(variant, place, hay, missing)
        if held is not None:  # all levels have the same modules: to close them erases them
            held.close()

    def _missing(
        self, variant: Variant, place: tuple[int, int, int], hay: Haystack
    ) -> list[tuple[int, Planted]]:
        return [
            (number, planted)
            for number, planted in enumerate(hay.planted)
            if (*variant.key, *place, number) not in self._journal.records
        ]

    def _held(self, level: Level | None, hay: Haystack, place: tuple[int, ...]) -> Held:
        if level is None:
            return HeldDocument(self._llm, self._prompts, hay.text)
        return HeldModules(self._llm, self._prompts, hay.text, level, name=f"haystack {place}")

    def _ask_cold(self, variant: Variant, place: Place, hay: Haystack, planted: Planted) -> None:
        """Ask while the document is unknown; what was computed for it is erased."""
        level = self._levels[variant.level]
        held = self._held(level, hay, place)
        held.open()
        # Where modules are computed as plain text, closing them erases nothing
        salt = "" if level is None else f"cold {variant.level} {place}"
        self._ask(variant, place, held, planted, salt=salt)
        held.close()

    def _ask_read(
        self,
        variant: Variant,
        place: tuple[int, int, int],
        hay: Haystack,
        missing: list[tuple[int, Planted]],
    ) -> Held:
        """Read the document, or find it read, and ask; the caller closes it."""
        held = self._held(self._levels[variant.level], hay, place)
        began = time.perf_counter()
        taken = held.read()
        read = {
            "seconds": time.perf_counter() - began,
            "tokens": taken.tokens,
            "cached_tokens": taken.cached_tokens,
        }
        if missing:
            self._journal.add((*variant.key, *place, READ), read)
        for number, planted in missing:
            self._ask(variant, (*place, number), held, planted)
        return held

    def _ask(
        self, variant: Variant, place: Place, held: Held, planted: Planted, *, salt: str = ""
    ) -> None:
        began = time.perf_counter()
        segments = held.segments(planted.needle.question)
        rendered = time.perf_counter() - began
        sampling = SamplingParams(
            max_tokens=self._niah.answer_tokens,
            temperature=0.0,
            logprobs=LIKELIEST if self._compared else None,
        )
        answer = self._stopwatch.ask(segments, sampling, salt=salt)
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
        self._journal.add((*variant.key, *place), record)

"""What prompts made of modules cost and save, at each level of exactness.

- quality: KL divergence and changed tokens against `exact`, as the gate measures them but without
  a limit of time; without --model on the embedded `probe`, a language model.
- retrieval: facts in modules that were encoded apart and come in random order, asked one by one:
  `needle` has one of a kind, `multi-key` has others beside it that differ in the key alone; on the
  embedded `needle`.
- speed: seconds to the first token on modules in random order, against computing the same prompt;
  from memory, and from disk after a restart (files dropped from memory, a new engine that knows
  only the tokens); without --model on random weights.

Random order means that no two prompts begin alike and that modules are at positions where they were
not encoded. The reference is the level `exact` of the same run.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from longctx.bench.config import BenchConfig, LevelsConfig, ModulesConfig, RoundsConfig
from longctx.bench.haystack import Haystack, haystacks
from longctx.bench.module_text import TextModule, asking, assembled, cut_text
from longctx.bench.modules_report import TASKS, Found, draw, results, tables
from longctx.bench.random_model import SIZES, write_random_llama
from longctx.bench.report import Report
from longctx.bench.restart import drop_from_memory, opened
from longctx.bench.timing import Stopwatch
from longctx.config import EngineConfig
from longctx.embedded import model_path
from longctx.llm import LLM
from longctx.needles.scores import matches
from longctx.quality.level_gate import LIMITS
from longctx.quality.level_measure import LevelWorkload, measure_levels
from longctx.quality.verdict import judge
from longctx.request import Piece, SamplingParams, Segment
from longctx.text.chat_template import ChatPrompts
from prompt_cache.level import EXACT, MODULAR, Level

DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)
FIRST_TOKEN = SamplingParams(max_tokens=1, temperature=0.0)
ANSWER = SamplingParams(max_tokens=48, temperature=0.0)
QUESTION_TOKENS = 32
LEVELS = (Level(16), MODULAR)

Say = Callable[[str], None]


def run(
    engine: EngineConfig,
    bench: BenchConfig,
    rounds: RoundsConfig,
    levels: LevelsConfig,
    modules: ModulesConfig,
    *,
    say: Say,
) -> Report:
    """Measures the chosen parts, each on a model that it makes sense on."""
    found = Found(levels.every_level or LEVELS)
    if "quality" in modules.every_part:
        _quality(_of(engine, model_path("probe")), modules, bench.seed, found, say)
    if "retrieval" in modules.every_part:
        _retrieval(_of(engine, model_path()), modules, bench.seed, found, say)
    if "speed" in modules.every_part:
        # Beside the user's folder if one is named: another disk is another measurement
        with TemporaryDirectory(dir=engine.cache.kv_dir) as scratch:
            model = Path(scratch) / modules.speed_model
            if engine.model.model is None:
                write_random_llama(model, SIZES[modules.speed_model], seed=bench.seed)
            _speed(_of(engine, model), Path(scratch), modules, rounds, bench.seed, found, say)
    return Report(
        results=tuple(results(found, modules)),
        tables=tuple(tables(found, modules)),
        draw=partial(draw, found, modules),
    )


def _of(engine: EngineConfig, model: Path) -> EngineConfig:
    """Returns the configuration with that model, unless one is named, and without a disk tier."""
    return replace(
        engine,
        model=replace(engine.model, model=engine.model.model or model),
        cache=replace(engine.cache, kv_dir=None),
    )


def _name(llm: LLM) -> str:
    info = llm.engine.info
    return f"{info.model_name}, {info.kv_codec} KV"


# -- quality --------------------------------------------------------------------------------------


def _quality(
    config: EngineConfig, modules: ModulesConfig, seed: int, found: Found, say: Say
) -> None:
    workload = LevelWorkload(limit_seconds=None)
    with opened(config) as llm:
        found.models["quality"] = _name(llm)
        measured = measure_levels(llm.engine, found.levels, workload=workload, seed=seed)
        vocab_size = llm.engine.info.vocab_size
    for level, each in measured.items():
        found.verdicts[level.name] = judge(level.name, each, LIMITS, vocab_size=vocab_size)
    say("quality done")


# -- retrieval ------------------------------------------------------------------------------------


def _retrieval(
    config: EngineConfig, modules: ModulesConfig, seed: int, found: Found, say: Say
) -> None:
    with opened(config) as llm:
        found.models["retrieval"] = _name(llm)
        for task, others in TASKS.items():
            for hay in haystacks(
                modules.modules * modules.fact_tokens,
                DEPTHS,
                questions=modules.fact_questions // len(DEPTHS),
                kind="any",
                distractor_count=others,
                seed=seed,
                tokenizer=llm.engine.tokenizer,
            ):
                _ask_all(llm, task, hay, modules, random.Random(f"{seed} {task}"), found)
            say(f"{task} done")


def _ask_all(
    llm: LLM,
    task: str,
    hay: Haystack,
    modules: ModulesConfig,
    rng: random.Random,
    found: Found,
) -> None:
    """Asks every question on a text that was cut into modules, all in one random order."""
    parts = []
    for text in cut_text(hay.text, modules.modules):
        token_ids = tuple(llm.engine.tokenizer.encode(text))
        name = llm.open_module([Piece(token_ids=token_ids, position=0)])
        parts.append(TextModule(name, len(token_ids)))
    rng.shuffle(parts)
    prompts = ChatPrompts(llm.engine.tokenizer)
    for level in (EXACT, *found.levels):
        right = found.right.setdefault((task, level.name), [])
        for planted in hay.planted:
            segments = asking(prompts, parts, level, planted.needle.question)
            answer = llm.answer(segments, ANSWER)
            right.append(matches(answer.text, planted.needle.answer, "exact"))
    for part in parts:
        llm.close_module(part.name)


# -- speed ----------------------------------------------------------------------------------------


def _speed(
    config: EngineConfig,
    scratch: Path,
    modules: ModulesConfig,
    rounds: RoundsConfig,
    seed: int,
    found: Found,
    say: Say,
) -> None:
    config = replace(config, cache=replace(config.cache, kv_dir=scratch / "kv"))
    rng = np.random.default_rng(seed)
    levels = (*found.levels, EXACT)
    with opened(config) as llm:
        found.models["speed"] = _name(llm)
        vocab_size = llm.engine.info.vocab_size
        # What modules say makes no difference to what they cost
        pieces = {
            TextModule(f"module {number}", modules.module_tokens): (
                Piece(token_ids=_random_ids(rng, vocab_size, modules.module_tokens), position=0),
            )
            for number in range(modules.modules)
        }
        for part, each in pieces.items():
            llm.open_module(each, module_id=part.name)
        _first_token(llm, list(pieces), levels[0], rng)  # is slow on its own account
        for number in range(rounds.rounds):
            for level in levels[:: -1 if number % 2 else 1]:
                seconds = _first_token(llm, list(pieces), level, rng)
                found.seconds.setdefault(("memory", level.name), []).append(seconds)
    say("from memory done")
    files = sorted((scratch / "kv").glob("*.kv"))
    for _ in range(rounds.rounds):
        for level in found.levels:
            with opened(config) as llm:
                llm.generate("a", FIRST_TOKEN)
                for part, each in pieces.items():
                    llm.engine.open_module(part.name, each)
                drop_from_memory(files)
                seconds = _first_token(llm, list(pieces), level, rng)
                found.seconds.setdefault(("disk", level.name), []).append(seconds)
    say("from disk done")


def _first_token(
    llm: LLM, parts: list[TextModule], level: Level, rng: np.random.Generator
) -> float:
    """Returns the seconds to the first token of a prompt: own text, modules shuffled, own text."""
    vocab_size = llm.engine.info.vocab_size
    before, question = (_random_ids(rng, vocab_size, QUESTION_TOKENS) for _ in range(2))
    shuffled = [parts[index] for index in rng.permutation(len(parts))]
    segments = (
        Segment(token_ids=before),
        *assembled(shuffled, level, len(before)),
        Segment(token_ids=question),
    )
    return Stopwatch(llm.engine).ask(segments, FIRST_TOKEN).first_token_seconds


def _random_ids(rng: np.random.Generator, vocab_size: int, tokens: int) -> tuple[int, ...]:
    return tuple(rng.integers(3, vocab_size, tokens).tolist())

"""The same model file by longctx and by other engines, in one run: speed, memory, a document.

The rivals are those whose interpreters or programs are named. Parts: `speed.py`, between engines
that are libraries in processes of their own; `documents.py`, between servers.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import RenderableType

from longctx.bench.config import BenchConfig, FillerConfig, RoundsConfig
from longctx.bench.random_model import SIZES
from longctx.bench.report import Parameter, Report, Result
from longctx.bench.retrieval.texts import filler
from longctx.bench.served.process import write_options
from longctx.bench.versus.contender import Engine, longctx_engine, rival, running
from longctx.bench.versus.document_report import (
    conversation_results,
    conversation_table,
    draw_conversations,
)
from longctx.bench.versus.documents import Conversation, converse, questions_on_text
from longctx.bench.versus.random_gguf import write_random_gguf
from longctx.bench.versus.servers import LlamaServer, LongctxServer, Server
from longctx.bench.versus.speed import Measured, measure_questions, measure_speeds
from longctx.bench.versus.speed_report import draw_speeds, speed_results, speed_tables
from longctx.bench.versus_config import PARTS, VersusConfig
from longctx.config import EngineConfig
from longctx.errors import InvalidRequest
from longctx.model.named import find_model, model_name
from longctx.needles.ruler_tasks import generated_sentences
from longctx.text.tokenizer import Tokenizer

ROOM_TOKENS = 64  # of a context beyond prompt and answer
CHAT_TOKENS = 256  # what a chat template and a question add to a document


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """One model in the forms that engines read: `gguf` is None where it is a folder alone."""

    own: Path
    gguf: Path | None
    transformers: Path
    name: str


def run(
    engine: EngineConfig,
    bench: BenchConfig,
    rounds: RoundsConfig,
    texts: FillerConfig,
    versus: VersusConfig,
    *,
    say: Callable[[str], None],
) -> Report:
    """Measure every part that is asked for. Raises LongctxError where longctx itself fails."""
    threads = engine.model.threads or len(os.sched_getaffinity(0))
    parts = versus.parts or (PARTS if engine.model.model is not None else ("speed",))
    results: list[Result] = []
    tables: list[RenderableType] = []
    drawings: list[Callable[[Path], None]] = []
    with TemporaryDirectory(prefix="longctx-versus-") as folder:
        scratch = Path(folder)
        models = _models(engine, versus, bench.seed, scratch)
        _check(versus, models)
        model = replace(engine.model, model=models.own, threads=threads)
        config = replace(engine, model=model)
        common: dict[str, Parameter] = {"model": models.name, "threads": threads}
        if "document" in parts:
            talks = _documents(config, versus, texts, bench.seed, models, scratch, say)
            results += conversation_results(talks, common)
            tables.append(conversation_table(talks, common))
            drawings.append(partial(draw_conversations, talks, common))
        if "speed" in parts:
            found = _speeds(config, versus, rounds, bench.seed, models, scratch, say)
            results += speed_results(found, common)
            tables += speed_tables(found, common)
            drawings.append(partial(draw_speeds, found, common))
    return Report(results=tuple(results), tables=tuple(tables), draw=partial(_draw, drawings))


def _models(engine: EngineConfig, versus: VersusConfig, seed: int, scratch: Path) -> Models:
    """Return the model that was named, or write one of random weights."""
    if engine.model.model is not None:
        path = find_model(engine.model.model)
        own = path if path.is_file() else None
        return Models(own=path, gguf=own, transformers=path, name=model_name(path))
    folder = scratch / "random"
    folder.mkdir()
    gguf, plain = write_random_gguf(
        folder, SIZES[versus.versus_model], versus.versus_weights, seed=seed
    )
    name = f"random Llama {versus.versus_model} {versus.versus_weights}"
    return Models(own=gguf, gguf=gguf, transformers=plain, name=name)


def _check(versus: VersusConfig, models: Models) -> None:
    """Raise InvalidRequest for what an engine could not read, before anything is measured."""
    for option in ("llama_python", "openvino_python", "llama_server"):
        if getattr(versus, option) is not None and models.gguf is None:
            raise InvalidRequest(
                f"--{option.replace('_', '-')} needs a GGUF file, and {models.own} is a folder; "
                "name a file by --model, or leave --model out for a model of random weights"
            )
    if versus.vllm_python is not None and models.transformers.is_file():
        raise InvalidRequest(
            f"--vllm-python needs a folder with safetensors, and {models.own} is a GGUF file; name "
            "a folder by --model, or leave --model out for a model of random weights"
        )


def _speeds(
    config: EngineConfig,
    versus: VersusConfig,
    rounds: RoundsConfig,
    seed: int,
    models: Models,
    scratch: Path,
    say: Callable[[str], None],
) -> dict[str, Measured]:
    plain = replace(config, cache=replace(config.cache, kv_dir=None))
    own = longctx_engine(write_options(plain, scratch / "speed.toml"))
    say("longctx: loading")
    with running(own) as contender:
        vocab_size, longest = contender.about["vocab_size"], contender.about["longest"]
        room = longest - versus.versus_tokens
        lengths = [length for length in versus.token_lengths if length <= room]
        if not lengths:
            raise InvalidRequest(
                f"versus_lengths={versus.versus_lengths}: {models.name} has room for {room} tokens"
            )
        context = lengths[-1] + versus.versus_tokens + ROOM_TOKENS
        rivals = _rivals(versus, models, config.model.threads or 1, context)
        found = {engine.name: Measured() for engine in (own, *rivals)}
        measure_speeds(
            contender,
            rivals,
            found,
            lengths,
            new_tokens=versus.versus_tokens,
            rounds=rounds.rounds,
            vocab_size=vocab_size,
            seed=seed,
            say=say,
        )
    # Beside the user's folder if one is named: another disk is another measurement
    with TemporaryDirectory(dir=config.cache.kv_dir) as kv_dir:
        stored = replace(config, cache=replace(config.cache, kv_dir=Path(kv_dir)))
        keeping = longctx_engine(write_options(stored, scratch / "questions.toml"))
        for engine in (keeping, *rivals):
            measure_questions(
                engine,
                found[engine.name],
                lengths[-1],
                rounds=rounds.rounds,
                vocab_size=vocab_size,
                seed=seed,
                say=say,
            )
    return found


def _rivals(versus: VersusConfig, models: Models, threads: int, context: int) -> list[Engine]:
    named = (
        ("llama.cpp", "with_llama_cpp.py", versus.llama_python, models.gguf),
        ("openvino", "with_openvino.py", versus.openvino_python, models.gguf),
        (
            "transformers",
            "with_transformers.py",
            versus.transformers_python,
            models.transformers,
        ),
        ("vllm", "with_vllm.py", versus.vllm_python, models.transformers),
    )
    return [
        rival(name, adapter, python, model=model, threads=threads, context=context)
        for name, adapter, python, model in named
        if python is not None and model is not None
    ]


def _documents(
    config: EngineConfig,
    versus: VersusConfig,
    texts: FillerConfig,
    seed: int,
    models: Models,
    scratch: Path,
    say: Callable[[str], None],
) -> dict[str, Conversation]:
    tokenizer = Tokenizer(models.own)
    if not tokenizer.has_chat_template:
        raise InvalidRequest(
            f"{models.name} has no chat template, so it cannot be asked about a document; "
            "take --compare speed"
        )
    sentences, _ = filler(texts.haystack)
    messages = questions_on_text(
        versus.text_length,
        2 * versus.asked,
        seed=seed,
        tokenizer=tokenizer,
        sentences=None if sentences is generated_sentences else sentences,
    )
    checked = min(versus.asked, versus.asked if versus.asked_again is None else versus.asked_again)
    again = [*range(checked), *range(versus.asked, versus.asked + checked)]
    options = write_options(
        replace(config, cache=replace(config.cache, kv_dir=None)), scratch / "server.toml"
    )
    servers: list[Server] = [LongctxServer(options, keys=len(again))]
    if versus.llama_server is not None and models.gguf is not None:
        context = versus.text_length + versus.said_tokens + CHAT_TOKENS
        threads = config.model.threads or 1
        servers.append(
            LlamaServer(versus.llama_server, models.gguf, threads=threads, context=context)
        )
    return {
        server.name: converse(
            server,
            messages,
            again,
            scratch / server.name,
            said_tokens=versus.said_tokens,
            say=say,
        )
        for server in servers
    }


def _draw(drawings: Sequence[Callable[[Path], None]], path: Path) -> None:
    """Draw the first part into `path`, and others beside it."""
    for number, draw in enumerate(drawings):
        draw(path if number == 0 else path.with_stem(f"{path.stem}-{number + 1}"))

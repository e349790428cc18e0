"""Chooses the type that a model computes in on a CPU, where its checkpoint leaves a choice.

Weights in bfloat16 are as exact in float32, and which of the two types is faster depends on the CPU
and on the model. So the model is loaded in both and timed, once, and the choice is kept: the type
is part of the key of every stored block, and after another choice nothing that is stored would be
found. It stays with the blocks, in `kv_dir`, also where that moves to another CPU. Read
`choose_dtype`.
"""

import contextlib
import gc
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import msgspec
import torch

from compress.shape import BLOCK_TOKENS
from longctx.attention.backend import BackendFactory
from longctx.attention.registry import BACKENDS, backend_for
from longctx.config import Dtype, EngineConfig
from longctx.engine.sequence import Sequence as EngineSequence
from longctx.model.loader import (
    LoadedModel,
    computes_bfloat16,
    exact_dtypes,
    load_model,
    weights_identity,
)
from longctx.quality.replay import Replay
from longctx.text.tokenizer import Tokenizer
from offload.disk.folder import COMPUTE_TYPES
from offload.machine_limits import memory_bytes

PROMPT_TOKENS = 320  # the first fifth is not timed: what is done once is done there
ANSWER_TOKENS = 16
ROUNDS = 5
ENOUGH_SECONDS = 4.0  # of rounds; one is always made


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds that a type takes for a token of a prompt and for one of an answer."""

    prompt_token: float
    answer_token: float

    @property
    def product(self) -> float:
        """What is compared: twice as fast in one of the two makes up for half as fast in the other.

        Prompts are read once and questions are asked often, but a prompt has the more tokens;
        so neither counts more.
        """
        return self.prompt_token * self.answer_token


@dataclass(frozen=True, slots=True, kw_only=True)
class DtypeChoice:
    """The compute type of a model; `reason` says why in one line, where others would have done.

    `model` is the model in that type where it is loaded already.
    """

    dtype: Dtype
    reason: str | None = None
    model: LoadedModel | None = None


class _Kept(msgspec.Struct, frozen=True):
    dtype: Dtype
    paces: dict[Dtype, Pace]


def choose_dtype(
    config: EngineConfig,
    folder: Path,
    *,
    cache_dir: Path | None,
    say: Callable[[str], None] = lambda _: None,
) -> DtypeChoice:
    """Return the type that `--dtype` asks for, else the only one, the kept one, or the fastest.

    With choices to time it takes as long as loading the model twice, and some seconds. `cache_dir`
    keeps the choice where `config` has no `kv_dir`. Raises ModelRefused.
    """
    asked = config.model.dtype
    if asked != "auto":
        return DtypeChoice(dtype=asked)
    dtypes = exact_dtypes(config.model, folder)
    if len(dtypes) == 1:
        return DtypeChoice(dtype=dtypes[0])
    identity = weights_identity(config.model, folder, cache_dir)
    paths = []
    if config.cache.kv_dir is not None:
        paths.append(config.cache.kv_dir.expanduser() / COMPUTE_TYPES / f"{identity}.json")
    if cache_dir is not None:  # a home may be shared by machines of several kinds
        paths.append(cache_dir / COMPUTE_TYPES / f"{identity}-{_cpu()}.json")
    kept = next(filter(None, map(_load, paths)), None)
    model = None
    if kept is None and computes_bfloat16():
        paces, model = _time_both(config, folder, dtypes, cache_dir, say)
        kept = _Kept(min(dtypes, key=lambda dtype: paces[dtype].product), paces)
    elif kept is None:
        kept = _Kept(dtypes[0], {})
    for path in paths:
        if _load(path) is None:
            _store(path, kept)
    is_loaded = model is not None and kept.dtype == dtypes[0]
    return DtypeChoice(dtype=kept.dtype, reason=_reason(kept), model=model if is_loaded else None)


def _time_both(
    config: EngineConfig,
    folder: Path,
    dtypes: Sequence[Dtype],
    cache_dir: Path | None,
    say: Callable[[str], None],
) -> tuple[dict[Dtype, Pace], LoadedModel]:
    """Load the model in each type, and return it in the first of them too.

    Both at once where half of the memory holds them, to be timed by turns; else one at a time.
    """
    paces: dict[Dtype, Pace] = {}
    tokenizer, backend = Tokenizer(folder), config.model.attention_backend
    models: dict[Dtype, LoadedModel] = {}
    for dtype in reversed(dtypes):  # the checkpoint's own last: it is likely to be served
        say(f"timing {dtype} on this CPU, once for this model")
        model = load_model(replace(config.model, dtype=dtype), folder, cache_dir=cache_dir)
        models[dtype] = model
        if 4 * model.spec.weight_bytes > memory_bytes():
            paces |= time_by_turns(models, tokenizer, backend)
            if dtype != dtypes[0]:
                models.clear()
                del model
                gc.collect()
    if len(paces) < len(dtypes):
        paces |= time_by_turns(models, tokenizer, backend)
    return paces, models[dtypes[0]]


def time_by_turns(
    models: Mapping[Dtype, LoadedModel], tokenizer: Tokenizer, attention_backend: str
) -> dict[Dtype, Pace]:
    """Time models on prompts and answers of random tokens, one after another in each round.

    The fastest round counts: what other programs do makes one longer, never shorter.
    """
    clocks = {
        dtype: _Clock(model, tokenizer, BACKENDS[backend_for(attention_backend, model.spec.device)])
        for dtype, model in models.items()
    }
    began = time.monotonic()
    for seed in range(ROUNDS):
        for clock in clocks.values():
            clock.run(seed)
        if time.monotonic() - began > ENOUGH_SECONDS:
            break
    return {dtype: clock.pace for dtype, clock in clocks.items()}


class _Clock:
    """Times rounds of one model: a prompt of random tokens, and as random an answer."""

    def __init__(self, model: LoadedModel, tokenizer: Tokenizer, backend: BackendFactory) -> None:
        spec = model.spec
        self._vocab_size = spec.vocab_size
        self._answer_tokens = min(ANSWER_TOKENS, spec.max_context // 4)
        self._prompt_tokens = min(PROMPT_TOKENS, spec.max_context - self._answer_tokens)
        self._replay = Replay(
            model,
            tokenizer,
            backend,
            codec="raw",
            blocks=(self._prompt_tokens + self._answer_tokens) // BLOCK_TOKENS + 1,
            sequences=1,
            chunk_tokens=self._prompt_tokens,
        )
        self.pace = Pace(math.inf, math.inf)

    def run(self, seed: int) -> None:
        """Compute a round, and keep its times where they are the shortest so far."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(self._vocab_size, (self._prompt_tokens,), generator=generator).tolist()
        sequence = self._replay.admit(ids)
        warm_tokens = self._prompt_tokens // 5
        self._feed(sequence, warm_tokens)
        chunk_tokens = self._prompt_tokens - warm_tokens
        prompt_token = self._feed(sequence, chunk_tokens) / chunk_tokens
        answer = []
        for token in ids[: self._answer_tokens]:
            sequence.blocks.tokens.append(token)
            answer.append(self._feed(sequence, 1))
        self._replay.release(sequence)
        self.pace = Pace(
            min(self.pace.prompt_token, prompt_token),
            min(self.pace.answer_token, median(answer)),
        )

    def _feed(self, sequence: EngineSequence, tokens: int) -> float:
        began = time.perf_counter()
        self._replay.feed([(sequence, tokens)], [1])
        return time.perf_counter() - began


def _cpu() -> str:
    """Name the instructions that decide how fast a type is."""
    amx = torch.cpu._is_amx_tile_supported()
    return f"{torch.backends.cpu.get_cpu_capability()}{'-BF16' * computes_bfloat16()}{'-AMX' * amx}"


def _reason(kept: _Kept) -> str:
    if not kept.paces:
        return f"{kept.dtype}, since the CPU that chose had no instructions for bfloat16"
    paces = [
        f"{1000 * pace.prompt_token:.3g} ms to read a token and {1000 * pace.answer_token:.3g} to "
        f"answer one in {dtype}"
        for dtype, pace in kept.paces.items()
    ]
    return f"{kept.dtype}, the faster type when this model was first loaded: {', '.join(paces)}"


def _load(path: Path) -> _Kept | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Kept)
    except (OSError, msgspec.DecodeError):
        return None


def _store(path: Path, kept: _Kept) -> None:
    """Keep the choice; where it cannot be written, it is made again at the next start."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(msgspec.json.encode(kept))
        os.replace(file.name, path)  # two servers may start at once

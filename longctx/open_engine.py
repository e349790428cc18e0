"""Makes an engine that is ready to serve, from a configuration and a model folder.

Everything that is decided once for an engine is decided here, in this order: the compute type
(which may have to be timed), the model, the attention backend, the codec (which may have to be
measured), memory and tiers.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from longctx.attention.registry import BACKENDS, backend_for
from longctx.config import CACHE_DIR, EngineConfig
from longctx.engine.cost_model import CostModel
from longctx.engine.engine import Engine
from longctx.engine.parts import EngineParts, one_rank_parts
from longctx.errors import InvalidRequest
from longctx.model.loader import load_model
from longctx.quality.compute_type import DtypeChoice, choose_dtype
from longctx.quality.gate import choose_codec
from longctx.quality.measurement_cache import identity_of
from longctx.quality.weights_gate import check_weights
from longctx.ring.parts import many_rank_parts
from longctx.ring.ranks import Ranks
from longctx.text.tokenizer import Tokenizer
from offload.machine_limits import cores


def open_engine(
    config: EngineConfig,
    model_folder: Path,
    *,
    cache_dir: Path = CACHE_DIR,
    ranks: Ranks | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Engine:
    """Open an engine that serves the model of a folder, as `engine_parts` says."""
    return Engine(engine_parts(config, model_folder, cache_dir=cache_dir, ranks=ranks, say=say))


def choose_type(
    config: EngineConfig,
    model_folder: Path,
    *,
    cache_dir: Path,
    say: Callable[[str], None] = lambda _: None,
) -> DtypeChoice:
    """Set the threads that compute here and choose the compute type, as `choose_dtype` says.

    With many ranks the head does so first, and tells the others: each might choose another.
    """
    # torch takes a thread for each core of the machine, also where a container may use fewer.
    torch.set_num_threads(config.model.threads or min(torch.get_num_threads(), cores()))
    return choose_dtype(config, model_folder, cache_dir=cache_dir, say=say)


def engine_parts(
    config: EngineConfig,
    model_folder: Path,
    *,
    cache_dir: Path = CACHE_DIR,
    ranks: Ranks | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> EngineParts:
    """Load the model, choose its codec and make the parts that an engine is given.

    `config.model.model` may differ from the folder. `cache_dir` keeps what was measured of models
    between starts. `ranks` are further ones, which share the work and keep a part of the KV blocks
    each. `say` is told how far a step is that takes long. Raises ModelRefused, also for a codec
    that costs the model too much, and InvalidRequest where `config` asks for ranks that are not
    given.
    """
    if ranks is None and config.ring.ranks > 1:
        raise InvalidRequest(
            f"ranks={config.ring.ranks} are processes that only longctx serve starts; leave it "
            "out here",
            param="ranks",
        )
    chosen = choose_type(config, model_folder, cache_dir=cache_dir, say=say)
    config = replace(config, model=replace(config.model, dtype=chosen.dtype))
    tokenizer = Tokenizer(model_folder)
    model = chosen.model or load_model(config.model, model_folder, cache_dir=cache_dir)
    backend = backend_for(config.model.attention_backend, model.spec.device)
    check_weights(
        config.model,
        model_folder,
        model,
        tokenizer,
        BACKENDS[backend],
        cache_dir=cache_dir,
        say=say,
    )
    codec = choose_codec(
        config.cache, model, tokenizer, BACKENDS[backend], cache_dir=cache_dir, say=say
    )
    # What the cost of a step depends on; the codec is a part of it, as its pages are read.
    depends = (
        *identity_of(model.spec), codec.codec, backend, torch.get_num_threads(), config.ring.ranks
    )  # fmt: skip
    digest = hashlib.sha256(repr(depends).encode()).hexdigest()
    cost = CostModel(path=cache_dir / "step-times" / f"{digest}.json")
    if ranks is None:
        parts = one_rank_parts(
            model,
            tokenizer,
            codec=codec,
            backend=backend,
            cache=config.cache,
            scheduler=config.scheduler,
            cost=cost,
        )
    else:
        parts = many_rank_parts(
            model,
            tokenizer,
            ranks,
            codec=codec,
            backend=backend,
            cache=config.cache,
            scheduler=config.scheduler,
            cost=cost,
        )
    return replace(parts, info=replace(parts.info, dtype_reason=chosen.reason))

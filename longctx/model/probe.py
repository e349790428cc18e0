"""What a loaded model really does, seen by running it twice on a handful of tokens.

Configuration fields are named differently in every architecture, and some lie. So the model runs
with an attention that only watches: which layers call it, with what shapes, under which mask. The
attention returns each token's own value, so that nothing else should carry anything from one
token to another; the second run changes a neighbour's tokens, position and place in the row, and
what the unchanged tokens show to the attention must stay. That catches recurrent layers,
convolutions and rotary types that look at the whole row. Read `probe_layers`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from longctx.errors import ModelRefused
from longctx.model.hf_attention import run_packed
from longctx.model.spec import LayerSpec

PROBE = "longctx_probe"
HEAD_DIMS = range(8, 257)

# The probe's masks are one int64 that says which keys a query sees: 0 all of its past, +w those in
# (p - w, p], -w those of its own chunk of w. What is none of these is refused.
UNKNOWN_MASK = torch.iinfo(torch.int64).min

# Keywords that change nothing where there is no cache, no dropout and one row.
HARMLESS = frozenset(
    {"dropout", "position_ids", "cache_position", "is_causal", "use_cache"}
    | {"output_attentions", "output_hidden_states", "output_router_logits"}
)

# Half the probe's tokens are watched, the others are their neighbours.
NEIGHBOURS = 4
WATCHED = 4
# Far above rounding in bfloat16, far below what a recurrent layer carries over.
MAX_CHANGE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One layer's call; `query` [heads, tokens, head_dim], the others with their own heads."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    sliding_window: int | None
    unknown: tuple[str, ...]  # keywords that nobody has told us how to honour


@dataclass(slots=True)
class _Watcher:
    """Travels through the model in place of a `LayerAttention`."""

    calls: list[_Call] = field(default_factory=list)


def register_probe() -> None:
    """Make the name `PROBE` known to transformers; doing it twice changes nothing."""
    AttentionInterface.register(PROBE, _watch)
    AttentionMaskInterface.register(PROBE, _coded_mask)


def probe_layers(
    model: PreTrainedModel, *, layers: int, vocab_size: int, max_context: int
) -> tuple[LayerSpec, ...]:
    """The facts of each of `layers` layers; raises ModelRefused where it cannot be served exactly.

    `model` must have been built with the attention implementation `PROBE`.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (NEIGHBOURS + WATCHED,), generator=generator)
    strangers = torch.randint(vocab_size, (NEIGHBOURS,), generator=generator)
    near = torch.arange(NEIGHBOURS + WATCHED)
    far = torch.arange(NEIGHBOURS) + max(max_context - NEIGHBOURS, NEIGHBOURS)
    first = _run(model, tokens, near)
    second = _run(
        model, torch.cat([tokens[NEIGHBOURS:], strangers]), torch.cat([near[NEIGHBOURS:], far])
    )
    _check_calls(first, layers)
    _check_dtypes(first, model.dtype)
    specs = tuple(_layer_spec(call, max_context) for call in first)
    _check_shared_keys(first)
    _check_independence(first, second)
    return specs


def _run(model: PreTrainedModel, tokens: Tensor, positions: Tensor) -> list[_Call]:
    watcher = _Watcher()
    row = torch.tensor([len(tokens) - 1], device=model.device)
    try:
        logits = run_packed(
            model, tokens.to(model.device), positions.to(model.device), watcher, row
        )
    except Exception as error:  # whatever the model's code raises, it cannot be served
        raise ModelRefused(
            f"{type(model).__name__} does not run with packed rows: {error}"
        ) from error
    if logits.shape[0] != 1:
        raise ModelRefused(
            f"{type(model).__name__} computes logits for every token of a prompt; "
            "it must accept logits_to_keep"
        )
    return watcher.calls


def _check_calls(calls: list[_Call], layers: int) -> None:
    called = [call.layer for call in calls]
    if called and called == list(range(layers)):
        return
    if len(set(called)) < layers or not called:
        raise ModelRefused(
            f"only {len(set(called))} of {layers} layers call a replaceable attention; the others "
            "(linear attention, Mamba, RWKV, ALiBi, code of their own) cannot be served exactly"
        )
    raise ModelRefused(f"attention is called in the order {called}, not once for each layer")


def _check_dtypes(calls: list[_Call], dtype: torch.dtype) -> None:
    for call in calls:
        found = {call.query.dtype, call.key.dtype, call.value.dtype}
        if found != {dtype}:
            raise ModelRefused(
                f"layer {call.layer} mixes {', '.join(sorted(map(str, found)))} in a model of "
                f"{dtype}; start with --dtype float32"
            )


def _layer_spec(call: _Call, max_context: int) -> LayerSpec:
    where = f"layer {call.layer}"
    heads, _, head_dim = call.query.shape
    kv_heads = call.key.shape[0]
    if not call.query.shape[2] == call.key.shape[2] == call.value.shape[2]:
        raise ModelRefused(
            f"{where} has query, key and value heads of {head_dim}, {call.key.shape[2]} and "
            f"{call.value.shape[2]} values (multi-head latent attention?); they must be equal"
        )
    if call.value.shape[0] != kv_heads or heads % kv_heads:
        raise ModelRefused(
            f"{where} has {heads} query, {kv_heads} key and {call.value.shape[0]} value heads; "
            "key and value heads must be equal and divide the query heads"
        )
    if head_dim not in HEAD_DIMS:
        raise ModelRefused(
            f"{where} has a head_dim of {head_dim}; it must be {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}"
        )
    if call.unknown:
        raise ModelRefused(f"{where} passes {', '.join(call.unknown)}, which cannot be honoured")
    window = _window(call, where, max_context)
    return LayerSpec(heads=heads, kv_heads=kv_heads, head_dim=head_dim, window=window)


def _window(call: _Call, where: str, max_context: int) -> int | None:
    mask = call.mask
    if mask is None or mask.dtype != torch.int64 or mask.numel() != 1 or mask == UNKNOWN_MASK:
        raise ModelRefused(
            f"{where} has a mask that is neither causal nor a sliding window (ALiBi, a position "
            "bias, attention to the future)"
        )
    reach = int(mask)
    if reach < 0:
        if -reach < max_context:
            raise ModelRefused(
                f"{where} attends within chunks of {-reach} tokens; start with --max-context "
                f"{-reach} or less"
            )
        return None
    window = reach if 0 < reach < max_context else None
    told = call.sliding_window
    told = told if told is not None and 0 < told < max_context else None
    if told is not None and told != window:
        raise ModelRefused(f"{where} names a window of {told} tokens but masks {window or 'none'}")
    return window


def _check_shared_keys(calls: list[_Call]) -> None:
    for call in calls:
        for earlier in calls[: call.layer]:
            if torch.equal(call.key, earlier.key) and torch.equal(call.value, earlier.value):
                raise ModelRefused(
                    f"layer {call.layer} shares its keys and values with layer {earlier.layer}; "
                    "keys shared across layers are not supported"
                )


def _check_independence(first: list[_Call], second: list[_Call]) -> None:
    """In `first` the watched tokens come last, in `second` they come first."""
    for one, other in zip(first, second, strict=True):
        for name in ("query", "key", "value"):
            before = getattr(one, name)[:, NEIGHBOURS:].float()
            after = getattr(other, name)[:, :WATCHED].float()
            change = (before - after).norm() / before.norm().clamp_min(1e-20)
            if not change <= MAX_CHANGE:  # NaN is no better
                raise ModelRefused(
                    f"layer {one.layer} carries something from token to token besides attention "
                    "(a recurrent state, a convolution, rotary frequencies that look at the whole "
                    "batch); such a model cannot share a batch or a cache"
                )


def _watch(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    batch: _Watcher | None = None,
    sliding_window: int | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The probe's attention: every token gets its own value."""
    if batch is None:
        raise ModelRefused("its layers do not hand their keywords on to the attention")
    unknown = [name for name, value in others.items() if value is not None]
    layer = module.layer_idx
    assert isinstance(layer, int), f"{type(module).__name__} does not know its layer"
    batch.calls.append(
        _Call(
            layer=layer,
            query=query[0],
            key=key[0],
            value=value[0],
            mask=attention_mask,
            sliding_window=sliding_window,
            unknown=tuple(sorted(set(unknown) - HARMLESS)),
        )
    )
    out = value[0].repeat_interleave(max(query.shape[1] // value.shape[1], 1), dim=0)
    return out.transpose(0, 1)[None].contiguous(), None


def _coded_mask(
    *,
    mask_function: Callable[..., Tensor],
    local_size: int | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    """Which keys transformers would show, as one number; see UNKNOWN_MASK."""
    code = UNKNOWN_MASK if attention_mask is not None else _mask_code(mask_function, local_size)
    return torch.full((1, 1, 1, 1), code, device=device)


def _mask_code(sees: Callable[..., Tensor], local_size: int | None) -> int:
    """Ask about pairs that tell the three patterns apart; `local_size` is a window or a chunk.

    With w=4: p=8 sees 5 to 8 through a window, only 8 in its chunk [8, 12); p=11 sees 8 to 11 in
    both.
    """
    reach = local_size or 0
    pairs = [(0, 0), (1, 0), (0, 1), (7, 7), (7, 8), (2 * reach, 2 * reach - 1)]
    pairs += [(3 * reach - 1, 2 * reach), (3 * reach - 1, 2 * reach - 1), (3 * reach, 3 * reach)]
    pairs += [(5 * reach + 9, key) for key in (0, 4 * reach + 9, 4 * reach + 10, 5 * reach + 10)]
    pairs = [(query, key) for query, key in pairs if key >= 0]
    zero = torch.zeros(1, dtype=torch.int64)
    try:
        seen = [
            bool(sees(zero, zero, torch.tensor([query]), torch.tensor([key])))
            for query, key in pairs
        ]
    except IndexError:  # it looks its answer up in a table of the present row
        return UNKNOWN_MASK
    patterns = {0: [key <= query for query, key in pairs]}
    if reach > 0:
        patterns[-reach] = [k <= q and k // reach == q // reach for q, k in pairs]
        patterns[reach] = [q - reach < k <= q for q, k in pairs]
    return next((code for code, pattern in patterns.items() if pattern == seen), UNKNOWN_MASK)

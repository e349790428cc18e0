"""Finds what a loaded model really does, by running it twice on a handful of tokens.

Configuration fields are named differently in every architecture, and some lie. So the model runs
with an attention that only records: which layers call it, with what shapes, under which mask. The
attention returns each token's own value, so that nothing else should carry anything from one token
to another. The second run changes the other tokens' ids, positions and indices in the row, and the
queries, keys and values of the unchanged tokens must stay as they were. That catches recurrent
layers, convolutions and rotary types that look at the whole row. Read `probe_layers`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from longctx.errors import ModelRefused
from longctx.model.call_recorder import CallRecorder, RecordedCall
from longctx.model.hf_attention import attend_packed, run_packed
from longctx.model.spec import LayerSpec

PROBE = "longctx_probe"
PROBE_UNMASKED = "longctx_probe_unmasked"  # the same, for which transformers makes no mask
HEAD_DIMS = range(8, 257)

# The probe's masks are one int64 that says which keys a query at p sees: 0 for all of its past, +w
# for those in (p - w, p], -w for those of its own chunk of w. Any other mask is refused.
UNKNOWN_MASK = torch.iinfo(torch.int64).min

# Keywords that change nothing where there is no cache, no dropout and one row.
HARMLESS = frozenset(
    {"dropout", "position_ids", "cache_position", "is_causal", "use_cache"}
    | {"output_attentions", "output_hidden_states", "output_router_logits"}
)

HONORED = frozenset({"scaling", "softcap", "s_aux"})  # parts of an `AttentionCall`

# Half of the probe's tokens are watched, the others are their neighbors.
NEIGHBORS = 4
WATCHED = 4
# Far above rounding in bfloat16, far below what a recurrent layer carries over.
MAX_CHANGE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class _Terms:
    """What transformers says of one layer's call beside its tensors."""

    mask: Tensor | None
    sliding_window: int | None
    unknown: tuple[str, ...]  # keywords that nobody has told us how to honor


class _ProbeRecorder(CallRecorder):
    """A recorder that keeps the terms of each call too."""

    def __init__(self) -> None:
        super().__init__()
        self.terms: list[_Terms] = []


def register_probe() -> None:
    """Register the probe with transformers; doing it twice changes nothing."""
    AttentionInterface.register(PROBE, _attend_probed)
    AttentionInterface.register(PROBE_UNMASKED, _attend_probed)
    AttentionMaskInterface.register(PROBE, _coded_mask)


def probe_layers(
    model: PreTrainedModel, *, layers: int, vocab_size: int, max_context: int
) -> tuple[LayerSpec, ...]:
    """Find the facts of each of the model's `layers` layers.

    Raises ModelRefused where the model cannot be served exactly. `model` must have been built with
    the attention implementation `PROBE`; it is left with another one.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (NEIGHBORS + WATCHED,), generator=generator)
    strangers = torch.randint(vocab_size, (NEIGHBORS,), generator=generator)
    near = torch.arange(NEIGHBORS + WATCHED)
    far = torch.arange(NEIGHBORS) + max(max_context - NEIGHBORS, NEIGHBORS)
    first = _run(model, tokens, near)
    # Positions that do not follow each other are several sequences to transformers, and its mask
    # then looks every pair that is asked for up in a table of the row's tokens. Beyond its end that
    # is an IndexError on a CPU; on a GPU it is an assert that ends all work there.
    model.set_attn_implementation(PROBE_UNMASKED)
    second = _run(
        model, torch.cat([tokens[NEIGHBORS:], strangers]), torch.cat([near[NEIGHBORS:], far])
    )
    _check_calls(first.calls, layers)
    _check_dtypes(first.calls, model.dtype)
    specs = tuple(
        _layer_spec(recorded, terms, max_context)
        for recorded, terms in zip(first.calls, first.terms, strict=True)
    )
    _check_shared_keys(first.calls)
    _check_independence(first.calls, second.calls)
    return specs


def _run(model: PreTrainedModel, tokens: Tensor, positions: Tensor) -> _ProbeRecorder:
    recorder = _ProbeRecorder()
    row = torch.tensor([len(tokens) - 1], device=model.device)
    try:
        logits = run_packed(
            model, tokens.to(model.device), positions.to(model.device), recorder, row
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
    return recorder


def _check_calls(calls: list[RecordedCall], layers: int) -> None:
    called = [recorded.call.layer for recorded in calls]
    if called and called == list(range(layers)):
        return
    if len(set(called)) < layers or not called:
        raise ModelRefused(
            f"only {len(set(called))} of {layers} layers call a replaceable attention; the others "
            "(linear attention, Mamba, RWKV, ALiBi, code of their own) cannot be served exactly"
        )
    raise ModelRefused(f"attention is called in the order {called}, not once for each layer")


def _check_dtypes(calls: list[RecordedCall], dtype: torch.dtype) -> None:
    for recorded in calls:
        found = {recorded.query.dtype, recorded.key.dtype, recorded.value.dtype}
        if found != {dtype}:
            raise ModelRefused(
                f"layer {recorded.call.layer} mixes {', '.join(sorted(map(str, found)))} in a "
                f"model of {dtype}; start with --dtype float32"
            )


def _layer_spec(recorded: RecordedCall, terms: _Terms, max_context: int) -> LayerSpec:
    where = f"layer {recorded.call.layer}"
    _, heads, head_dim = recorded.query.shape
    _, kv_heads, key_dim = recorded.key.shape
    _, value_heads, value_dim = recorded.value.shape
    if not head_dim == key_dim == value_dim:
        raise ModelRefused(
            f"{where} has query, key and value heads of {head_dim}, {key_dim} and "
            f"{value_dim} values (multi-head latent attention?); they must be equal"
        )
    if value_heads != kv_heads or heads % kv_heads:
        raise ModelRefused(
            f"{where} has {heads} query, {kv_heads} key and {value_heads} value heads; "
            "key and value heads must be equal and divide the query heads"
        )
    if head_dim not in HEAD_DIMS:
        raise ModelRefused(
            f"{where} has a head_dim of {head_dim}; it must be {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}"
        )
    if terms.unknown:
        raise ModelRefused(f"{where} passes {', '.join(terms.unknown)}, which cannot be honored")
    window = _window(terms, where, max_context)
    return LayerSpec(heads=heads, kv_heads=kv_heads, head_dim=head_dim, window=window)


def _window(terms: _Terms, where: str, max_context: int) -> int | None:
    mask = terms.mask
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
    told = terms.sliding_window
    told = told if told is not None and 0 < told < max_context else None
    if told is not None and told != window:
        raise ModelRefused(f"{where} names a window of {told} tokens but masks {window or 'none'}")
    return window


def _check_shared_keys(calls: list[RecordedCall]) -> None:
    for layer, one in enumerate(calls):
        for earlier, other in enumerate(calls[:layer]):
            if torch.equal(one.key, other.key) and torch.equal(one.value, other.value):
                raise ModelRefused(
                    f"layer {layer} shares its keys and values with layer {earlier}; "
                    "keys shared across layers are not supported"
                )


def _check_independence(first: list[RecordedCall], second: list[RecordedCall]) -> None:
    """Compare the watched tokens, which come last in `first` and first in `second`."""
    for one, other in zip(first, second, strict=True):
        for name in ("query", "key", "value"):
            before = getattr(one, name)[NEIGHBORS:].float()
            after = getattr(other, name)[:WATCHED].float()
            change = (before - after).norm() / before.norm().clamp_min(1e-20)
            if not change <= MAX_CHANGE:  # NaN is no better
                raise ModelRefused(
                    f"layer {one.call.layer} carries something from token to token besides "
                    "attention (a recurrent state, a convolution, rotary frequencies that look at "
                    "the whole batch); such a model cannot share a batch or a cache"
                )


def _attend_probed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    batch: _ProbeRecorder | None = None,
    sliding_window: int | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Note the terms of the call, then attend as the served model does: through `batch`."""
    if batch is None:
        raise ModelRefused("its layers do not hand their keywords on to the attention")
    given = {name for name, value in keywords.items() if value is not None}
    unknown = tuple(sorted(given - HARMLESS - HONORED))
    batch.terms.append(_Terms(mask=attention_mask, sliding_window=sliding_window, unknown=unknown))
    return attend_packed(module, query, key, value, attention_mask, batch=batch, **keywords)


def _coded_mask(
    *,
    mask_function: Callable[..., Tensor],
    local_size: int | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    """Encode which keys transformers would show as one number; see UNKNOWN_MASK."""
    code = UNKNOWN_MASK if attention_mask is not None else _mask_code(mask_function, local_size)
    return torch.full((1, 1, 1, 1), code, device=device)


def _mask_code(sees: Callable[..., Tensor], local_size: int | None) -> int:
    """Ask about pairs that tell the three patterns apart; `local_size` is a window or a chunk.

    Worked example with w=4: the query at 8 sees keys 5 to 8 through a window, but only 8 in its
    chunk [8, 12); the query at 11 sees keys 8 to 11 in both.
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
    except IndexError:  # the function looks it up in a table of the present row
        return UNKNOWN_MASK
    patterns = {0: [key <= query for query, key in pairs]}
    if reach > 0:
        patterns[-reach] = [k <= q and k // reach == q // reach for q, k in pairs]
        patterns[reach] = [q - reach < k <= q for q, k in pairs]
    return next((code for code, pattern in patterns.items() if pattern == seen), UNKNOWN_MASK)

"""Puts the fused parts of `gpu_layers.py` into a loaded model, wherever they compute the same.

Names decide nothing. The model runs once while its modules are watched: which of a module's linear
layers map its own rows, and which gives its result. That says what a fused part would look like. It
is kept if, in float32, its results equal those of the module on random rows of very different
magnitudes; and in attention also the queries, keys and values. Norms come first, then what holds
them: gated units and attentions, then the layers that hold these. What is like nothing here stays
as transformers made it, with more launches. Read `fuse_layers`.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longctx.model.call_recorder import CallRecorder, RecordedCall
from longctx.model.gpu_layers import (
    ACTIVATIONS,
    MOST_WIDTH,
    STYLES,
    FusedAttention,
    FusedGate,
    FusedLayer,
    FusedNorm,
    Turning,
)
from longctx.model.hf_attention import run_packed
from longctx.model.norm_fusing import fuse_norms
from longctx.model.widened import Widened

TYPES = (torch.float32, torch.bfloat16, torch.float16)
POSITIONS = (0, 31, 1_000, 10_000)
MAGNITUDES = (1e-2, 1.0, 30.0)  # of rows; a clip or a cap shows at the largest
TOLERANCE = 1e-4  # of the norm of what is compared: float32 sums in another order give 1e-6


class Fused(NamedTuple):
    """How many modules of each kind were replaced."""

    norms: int
    gates: int
    attentions: int
    layers: int


@dataclass(frozen=True, slots=True)
class _Seen:
    """How a module was called, and what its own linear layers did in that call.

    `shape` is that of its rows. `joined` map these as they came, in the order of their calls;
    `last` gives the module's result. `attends` says whether it was handed the recorder.
    """

    shape: torch.Size
    keywords: dict[str, Any]  # but for the rows and the recorder
    attends: bool
    joined: tuple[nn.Linear, ...]
    last: nn.Linear | None


Candidates = Callable[[nn.Module, _Seen], Iterator[nn.Module]]


@torch.inference_mode()
def fuse_layers(model: nn.Module, *, vocab_size: int, max_context: int) -> Fused:
    """Replace what is recognized; `model` must have its attention registered (`hf_attention.py`).

    While a layer is replaced, its weights are held twice.
    """
    norms = fuse_norms(model, FusedNorm, types=TYPES, most_width=MOST_WIDTH)
    positions = [position for position in POSITIONS if position < max_context]
    tokens = torch.arange(len(positions)) % vocab_size
    seen = _watch(model, tokens, torch.tensor(positions))
    gates = _replace(model, seen, _gates)
    attentions = _replace(model, seen, _attentions)
    return Fused(norms, gates, attentions, layers=_replace(model, seen, _layers))


def _replace(model: nn.Module, seen: dict[str, _Seen], candidates: Candidates) -> int:
    replaced = 0
    for path, how in seen.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:  # its parent is a fused one by now
            continue
        for candidate in candidates(module, how):
            if _equal(module, candidate, how):
                model.set_submodule(path, candidate.eval())
                replaced += 1
                break
    return replaced


# -- what modules do -------------------------------------------------------------------------------


def _watch(model: nn.Module, tokens: Tensor, positions: Tensor) -> dict[str, _Seen]:
    """Run the model in float32; return by path what modules that map [1, n, width] did.

    A module that is in several places, or is given more without a name, is left out.
    """
    calls: dict[nn.Module, tuple[Tensor, dict[str, Any]]] = {}
    results: dict[nn.Module, Any] = {}
    linears: list[nn.Linear] = []  # in the order of their calls
    paths: dict[nn.Module, list[str]] = {}
    handles = []

    def before(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        first = next(iter(inspect.signature(module.forward).parameters), "")
        others = {name: value for name, value in keywords.items() if name != first}
        rows = args[0] if args else keywords.get(first)
        if isinstance(rows, Tensor) and rows.dim() == 3 and len(args) <= 1:
            calls[module] = rows, others

    def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        results[module] = result[0] if isinstance(result, tuple) else result
        if type(module) is nn.Linear:
            linears.append(module)

    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
        if len(paths[module]) == 1:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
    device = next(model.parameters()).device
    row = torch.tensor([len(tokens) - 1], device=device)
    try:
        with Widened():
            run_packed(model, tokens.to(device), positions.to(device), CallRecorder(), row)
    finally:
        for handle in handles:
            handle.remove()
    seen = {}
    for module, (rows, keywords) in calls.items():
        path, *others = paths[module]
        children = set(module.children())
        if others or not children or isinstance(module, nn.Linear):
            continue
        own = [each for each in linears if each in children and each in calls]
        last = [each for each in own if results[each] is results[module]]
        seen[path] = _Seen(
            shape=rows.shape,
            keywords={name: value for name, value in keywords.items() if name != "batch"},
            attends="batch" in keywords,
            joined=tuple(each for each in own if calls[each][0] is rows),
            last=last[0] if last else None,
        )
    return seen


def _run(module: nn.Module, rows: Tensor, how: _Seen) -> tuple[Any, list[RecordedCall]]:
    """Call a module as it was seen to be called, in float32, with other rows."""
    recorder = CallRecorder()
    with Widened():
        if how.attends:
            result = module(rows, **how.keywords, batch=recorder)
        else:
            result = module(rows, **how.keywords)
    return result, recorder.calls


def _rows(module: nn.Module, how: _Seen, magnitude: float) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(how.shape, generator=generator) * magnitude
    return rows.to(next(module.parameters()).device)


def _equal(module: nn.Module, candidate: nn.Module, how: _Seen) -> bool:
    """Whether both compute the same, and hand the same on to attention."""
    for magnitude in MAGNITUDES:
        wanted, wanted_calls = _run(module, _rows(module, how, magnitude), how)
        try:
            found, calls = _run(candidate, _rows(module, how, magnitude), how)
        except TypeError:  # a part of it takes other arguments, or gives something else
            return False
        if isinstance(wanted, tuple) and isinstance(found, tuple):
            wanted, found = wanted[0], found[0]
        if not _close(found, wanted) or len(calls) != len(wanted_calls):
            return False
        for one, other in zip(calls, wanted_calls, strict=True):
            if not all(
                _close(getattr(one, name), getattr(other, name))
                for name in ("query", "key", "value")
            ):
                return False
    return True


def _close(found: Any, wanted: Any) -> bool:
    if not isinstance(found, Tensor) or not isinstance(wanted, Tensor):
        return False
    if found.shape != wanted.shape:
        return False
    found, wanted = found.float(), wanted.float()
    return bool((found - wanted).norm() <= TOLERANCE * wanted.norm())


# -- what may take their places --------------------------------------------------------------------


def _gates(module: nn.Module, how: _Seen) -> Iterator[nn.Module]:
    """Yield gated units of two linear layers, or of one that is both, and of one after them."""
    last = how.last
    if last is None or not _has_only(module, *how.joined, last) or how.attends:
        return
    for order in permutations(how.joined):
        if sum(each.out_features for each in order) != 2 * last.in_features:
            continue
        joined = _join(order)
        for activation in ACTIVATIONS:
            yield FusedGate(joined, last, activation)


def _attentions(module: nn.Module, how: _Seen) -> Iterator[nn.Module]:
    """Yield attentions of linear layers for queries, keys and values, or of one for all of them."""
    last = how.last
    if last is None or not how.joined or not how.attends:
        return
    _, calls = _run(module, _rows(module, how, 1.0), how)
    if len(calls) != 1:
        return
    seen = calls[0]
    _, heads, dims = seen.query.shape
    kv_heads = seen.key.shape[1]
    norms = [each for each in module.children() if isinstance(each, FusedNorm)]
    sinks = [] if seen.call.sinks is None else [seen.call.sinks]
    fits = [
        order
        for order in permutations(how.joined)
        if [each.out_features for each in order]
        in ([heads * dims, kv_heads * dims, kv_heads * dims], [(heads + 2 * kv_heads) * dims])
    ]
    if not fits or not _has_only(module, *how.joined, *norms, last, beside=sinks):
        return
    of_heads = all(norm.factors.shape[0] == dims for norm in norms)
    alike = len({(norm.epsilon, norm.twice) for norm in norms}) <= 1
    if len(norms) not in (0, 2) or not of_heads or not alike:
        return
    pairs = list(permutations(norms)) if norms else [None]
    styles = STYLES if _angles(how, dims) else ()
    for order in fits:
        joined = _join(order)
        for style, pair in product((*styles, None), pairs):
            turning = Turning(style, pair)  # type: ignore[arg-type]
            yield FusedAttention(joined, last, seen.call, (heads, kv_heads, dims), turning)


def _layers(module: nn.Module, how: _Seen) -> Iterator[nn.Module]:
    """Yield layers of two norms, an attention and something else."""
    children = [each for each in module.children() if not isinstance(each, nn.Dropout)]
    norms = [each for each in children if isinstance(each, FusedNorm)]
    others = [each for each in children if not isinstance(each, FusedNorm)]
    if len(norms) != 2 or len(others) != 2 or not how.attends:
        return
    if _has_only(module, *children):
        for attention, unit in permutations(others):
            for pair in permutations(norms):
                yield FusedLayer(module, pair, attention, unit)


def _angles(how: _Seen, dims: int) -> bool:
    """Whether cosines and sines of as many rows, for an even part of a head, were handed in."""
    given = how.keywords.get("position_embeddings")
    if not isinstance(given, tuple) or len(given) != 2:
        return False
    return all(
        isinstance(each, Tensor)
        and each.shape[:-1] == how.shape[:-1]
        and each.shape[-1] <= dims
        and each.shape[-1] % 2 == 0
        for each in given
    )


def _has_only(module: nn.Module, *parts: nn.Module, beside: Sequence[Tensor] = ()) -> bool:
    """Whether these parts, and tensors, have all of a module's parameters."""
    known = {each for part in parts for each in part.parameters()} | set(beside)
    return set(module.parameters()) <= known


def _join(linears: Sequence[nn.Linear]) -> nn.Linear:
    """Make one layer of several that map the same rows: its outputs are theirs, in order."""
    if len(linears) == 1:
        return linears[0]
    weight = torch.cat([each.weight for each in linears])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if any(each.bias is not None for each in linears):
        biases: list[Tensor] = [
            weight.new_zeros(each.out_features) if each.bias is None else each.bias
            for each in linears
        ]
        joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return joined

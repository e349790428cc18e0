"""Puts fused parts of layers into a loaded model, wherever they compute the same.

Names decide nothing. The model runs once while its modules are watched: which of a module's linear
layers map its own rows, and which gives its result. That says what a fused part would look like. It
is kept if its results equal those of the module on random rows of very different magnitudes; and in
attention also the queries, keys and values. Norms have been found before (`norm_fusing.py`): gated
units and attentions come first, then the layers that hold these. What is like nothing here stays as
transformers made it, with more calls. Which parts there are is the device's matter (`Parts`: see
`cpu_layers.py`, `gpu_layers.py`). Read `fuse_layers`.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import permutations, product
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from longctx.model.call_recorder import CallRecorder, RecordedCall
from longctx.model.hf_attention import run_packed
from longctx.model.layer_attention import AttentionCall

POSITIONS = (0, 31, 1_000, 10_000)
MAGNITUDES = (1e-2, 1.0, 30.0)  # of rows; a clip or a cap shows at the largest


class Fused(NamedTuple):
    """How many modules of each kind were replaced."""

    gates: int
    attentions: int
    layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionForm:
    """What an attention looks like: it has `joined` layers for queries, keys and values, or one.

    `heads` are those of queries, those of keys, and dims of a head. `norms` are those of query
    heads and of key heads, or none. `style` is one of the parts' `styles`, or None where positions
    are not seen.
    """

    joined: Sequence[Any]
    last: Any
    call: AttentionCall
    heads: tuple[int, int, int]
    norms: tuple[Any, Any] | None
    style: Any


class LayerInPlace(nn.Module):
    """A layer that adds its attention's result to its rows, and its unit's to the sum.

    Each is given what a norm made of the rows. Code around a layer may look at its attributes, so
    it has those of the module in whose place it is.
    """

    def __init__(
        self,
        original: nn.Module,
        norms: Sequence[nn.Module],
        attention: nn.Module,
        unit: nn.Module,
    ) -> None:
        super().__init__()
        attributes = vars(original).items()
        own = {name: value for name, value in attributes if not name.startswith("_")}
        self.__dict__.update(own | {"training": False})
        self.before_attention, self.before_unit = norms
        self.attention, self.unit = attention, unit


class Parts(Protocol):
    """The fused parts of one kind of device."""

    linear: type[nn.Module]  # what products are there, before parts are fused
    norm: type[nn.Module]  # what norms are there
    styles: Sequence[Any]  # in which heads are turned to their positions

    def context(self) -> AbstractContextManager[Any]:
        """Return that in which a module and what may take its place are compared."""

    def same(self, found: Tensor, wanted: Tensor) -> bool:
        """Say whether results of one shape are close enough to be taken for equal."""

    def gates(self, module: nn.Module, joined: Sequence[Any], last: Any) -> Iterator[nn.Module]:
        """Yield what a gated unit may be: `joined` are gates, then what they pass; or one is both.

        `module` is that in whose place it would be.
        """

    def attention(self, module: nn.Module, form: AttentionForm) -> nn.Module:
        """Return an attention of this form, in the place of `module`."""

    def layer(
        self, module: nn.Module, norms: Sequence[Any], attention: nn.Module, unit: nn.Module
    ) -> nn.Module:
        """Return a `LayerInPlace` of `module`."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """How a module was called, and what its own linear layers did in that call.

    `shape` is that of its rows. `joined` map these as they came, in the order of their calls;
    `last` gives the module's result. `attends` says whether it was handed the recorder.
    """

    shape: torch.Size
    keywords: dict[str, Any]  # but for the rows and the recorder
    attends: bool
    joined: tuple[nn.Module, ...]
    last: nn.Module | None
    rows: Tensor  # random, of magnitude 1


Candidates = Callable[[Parts, nn.Module, _Seen], Iterator[nn.Module]]


@torch.inference_mode()
def fuse_layers(model: nn.Module, parts: Parts, *, vocab_size: int, max_context: int) -> Fused:
    """Replace what is recognized; `model` must use our attention (`hf_attention.py`)."""
    positions = [position for position in POSITIONS if position < max_context]
    tokens = torch.arange(len(positions)) % vocab_size
    seen = _watch(model, parts, tokens, torch.tensor(positions))
    replace = partial(_replace, model, parts, seen)
    return Fused(gates=replace(_gates), attentions=replace(_attentions), layers=replace(_layers))


def _replace(model: nn.Module, parts: Parts, seen: dict[str, _Seen], candidates: Candidates) -> int:
    replaced = 0
    for path, how in seen.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:  # its parent is a fused one by now
            continue
        for candidate in candidates(parts, module, how):
            if _equal(parts, module, candidate, how):
                model.set_submodule(path, candidate.eval())
                replaced += 1
                break
    return replaced


# -- what modules do -------------------------------------------------------------------------------


def _watch(model: nn.Module, parts: Parts, tokens: Tensor, positions: Tensor) -> dict[str, _Seen]:
    """Run the model; return by path what modules that map [1, n, width] did.

    A module that is in several places, or is given more without a name, is left out.
    """
    calls: dict[nn.Module, tuple[Tensor, dict[str, Any]]] = {}
    results: dict[nn.Module, Any] = {}
    linears: list[nn.Module] = []  # in the order of their calls
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
        if type(module) is parts.linear:
            linears.append(module)

    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
        if len(paths[module]) == 1:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
    device = next(model.parameters()).device
    row = torch.tensor([len(tokens) - 1], device=device)
    try:
        with parts.context():
            run_packed(model, tokens.to(device), positions.to(device), CallRecorder(), row)
    finally:
        for handle in handles:
            handle.remove()
    generator = torch.Generator().manual_seed(2)
    seen = {}
    for module, (rows, keywords) in calls.items():
        path, *others = paths[module]
        children = set(module.children())
        if others or not children or type(module) is parts.linear:
            continue
        own = [each for each in linears if each in children and each in calls]
        last = [each for each in own if results[each] is results[module]]
        seen[path] = _Seen(
            shape=rows.shape,
            keywords={name: value for name, value in keywords.items() if name != "batch"},
            attends="batch" in keywords,
            joined=tuple(each for each in own if calls[each][0] is rows),
            last=last[0] if last else None,
            rows=torch.randn(rows.shape, generator=generator).to(rows),
        )
    return seen


def _run(
    parts: Parts, module: nn.Module, magnitude: float, how: _Seen
) -> tuple[Any, list[RecordedCall]]:
    """Call a module as it was seen to be called, with other rows."""
    recorder = CallRecorder()
    rows = how.rows * magnitude
    with parts.context():
        if how.attends:
            result = module(rows, **how.keywords, batch=recorder)
        else:
            result = module(rows, **how.keywords)
    return result, recorder.calls


def _equal(parts: Parts, module: nn.Module, candidate: nn.Module, how: _Seen) -> bool:
    """Whether both compute the same, and hand the same on to attention."""
    for magnitude in MAGNITUDES:
        wanted, wanted_calls = _run(parts, module, magnitude, how)
        try:
            found, calls = _run(parts, candidate, magnitude, how)
        except TypeError:  # a part of it takes other arguments, or gives something else
            return False
        if isinstance(wanted, tuple) and isinstance(found, tuple):
            wanted, found = wanted[0], found[0]
        if not _close(parts, found, wanted) or len(calls) != len(wanted_calls):
            return False
        for one, other in zip(calls, wanted_calls, strict=True):
            if not all(
                _close(parts, getattr(one, name), getattr(other, name))
                for name in ("query", "key", "value")
            ):
                return False
    return True


def _close(parts: Parts, found: Any, wanted: Any) -> bool:
    if not isinstance(found, Tensor) or not isinstance(wanted, Tensor):
        return False
    return found.shape == wanted.shape and parts.same(found, wanted)


# -- what may take their places --------------------------------------------------------------------


def _gates(parts: Parts, module: nn.Module, how: _Seen) -> Iterator[nn.Module]:
    """Yield gated units of two linear layers, or of one that is both, and of one after them."""
    last: Any = how.last
    if last is None or not _has_only(module, *how.joined, last) or how.attends:
        return
    for order in permutations(how.joined):
        if sum(_outputs(each) for each in order) == 2 * last.in_features:
            yield from parts.gates(module, order, last)


def _attentions(parts: Parts, module: nn.Module, how: _Seen) -> Iterator[nn.Module]:
    """Yield attentions of linear layers for queries, keys and values, or of one for all of them."""
    last = how.last
    if last is None or not how.joined or not how.attends:
        return
    _, calls = _run(parts, module, 1.0, how)
    if len(calls) != 1:
        return
    seen = calls[0]
    _, heads, dims = seen.query.shape
    kv_heads = seen.key.shape[1]
    norms: list[Any] = [each for each in module.children() if isinstance(each, parts.norm)]
    sinks = [] if seen.call.sinks is None else [seen.call.sinks]
    fits = [
        order
        for order in permutations(how.joined)
        if [_outputs(each) for each in order]
        in ([heads * dims, kv_heads * dims, kv_heads * dims], [(heads + 2 * kv_heads) * dims])
    ]
    if not fits or not _has_only(module, *how.joined, *norms, last, beside=sinks):
        return
    of_heads = all(norm.factors.shape[0] == dims for norm in norms)
    alike = len({(norm.epsilon, norm.twice) for norm in norms}) <= 1
    if len(norms) not in (0, 2) or not of_heads or not alike:
        return
    pairs: list[Any] = list(permutations(norms)) if norms else [None]
    styles = parts.styles if _angles(how, dims) else ()
    for joined, style, pair in product(fits, (*styles, None), pairs):
        form = AttentionForm(
            joined=joined,
            last=last,
            call=seen.call,
            heads=(heads, kv_heads, dims),
            norms=pair,
            style=style,
        )
        yield parts.attention(module, form)


def _layers(parts: Parts, module: nn.Module, how: _Seen) -> Iterator[nn.Module]:
    """Yield layers of two norms, an attention and something else."""
    children = [each for each in module.children() if not isinstance(each, nn.Dropout)]
    norms = [each for each in children if isinstance(each, parts.norm)]
    others = [each for each in children if not isinstance(each, parts.norm)]
    if len(norms) != 2 or len(others) != 2 or not how.attends:
        return
    if _has_only(module, *children):
        for attention, unit in permutations(others):
            for pair in permutations(norms):
                yield parts.layer(module, pair, attention, unit)


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


def _outputs(linear: nn.Module) -> int:
    outputs = linear.out_features
    assert isinstance(outputs, int)
    return outputs

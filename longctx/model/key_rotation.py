"""Finds how a model rotates its keys, so that cached ones can serve at other positions.

A rotary model turns pairs of a key's dimensions by angles that grow with its position. Keys that
were encoded d positions before their present one give the right scores to a query that is turned
back by d: q . R(d) k = R(-d) q . k. So queries are turned in order to move keys, and the cached
keys stay as they are, encoded and shared.

Pairs and frequencies are found by observation. The candidates for frequencies are the model's own
buffers, those for pairs are the layouts in use. The rotation is the candidate that explains every
key that the model makes of some tokens, at positions near and far, in contexts short and long.
Where none does, the model's keys are not moved. Read `find_relocation`.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from longctx.model.call_recorder import CallRecorder, RecordedCall
from longctx.model.hf_attention import run_packed
from longctx.model.spec import Relocation, Rotation

TOKENS = 4  # recorded at each position
POSITIONS = ((0, 1, 2), (0, 31, 1_000, 10_000))  # of two contexts, a short and a long one
# The error is relative to the magnitude of a pair of dimensions. A bfloat16 key is off by 0.004,
# angles computed in float32 by 0.001 at position 10,000; with another frequency or another pair a
# key is off by 0.1 and more.
MAX_ERROR = 0.02


def find_relocation(model: nn.Module, *, vocab_size: int, max_context: int) -> Relocation:
    """Find whether and how the keys of `model` can be moved.

    Its attention must be registered (`register_attention`). The model runs twice, on few tokens.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab_size, (TOKENS,), generator=generator)
    contexts = [
        [position for position in positions if position < max_context] for positions in POSITIONS
    ]
    if len(contexts[-1]) < 2:
        return Relocation(
            shiftable=False,
            reason=f"a context of {max_context} tokens is too short to see how keys turn",
        )
    seen, frequencies = [], dict.fromkeys(_frequencies(model))
    for positions in contexts:
        seen.append(_record(model, tokens, positions))
        frequencies |= dict.fromkeys(_frequencies(model))  # LongRoPE chooses by the length
    rotations: list[Rotation | None] = []
    likely: dict[Rotation, None] = {}  # rotations that explained another layer are tried first
    for layer, calls in enumerate(zip(*seen, strict=True)):
        pairs = list(zip(contexts, calls, strict=True))
        keys = [(at, _by_position(each.key, at)) for at, each in pairs]
        values = [(at, _by_position(each.value, at)) for at, each in pairs]
        if _error(None, values) > MAX_ERROR:
            return _not_shiftable("positions are part of its hidden states (learned ones)")
        candidates = [*likely, *_candidates(frequencies, keys[0][1].shape[-1])]
        errors = {each: _error(each, keys) for each in (None, *candidates)}
        best = min(errors, key=lambda each: errors[each])
        if not errors[best] <= MAX_ERROR:
            return _not_shiftable(
                f"layer {layer} turns its keys in no known way, or in one that depends on the "
                f"length of the context (off by {errors[best]:.2g} of a key, at most "
                f"{MAX_ERROR:g} allowed)"
            )
        rotations.append(best)
        if best is not None:
            likely[best] = None
    turning = sum(rotation is not None for rotation in rotations)
    how = ", ".join(f"{2 * len(each.frequencies)} dimensions" for each in likely) or "none"
    return Relocation(
        shiftable=True,
        reason=f"{turning} of {len(rotations)} layers turn their keys ({how}), as was checked",
        rotations=tuple(rotations),
    )


def _not_shiftable(reason: str) -> Relocation:
    return Relocation(shiftable=False, reason=reason)


def _record(model: nn.Module, tokens: Tensor, positions: list[int]) -> list[RecordedCall]:
    """Compute the same tokens at each of `positions`, all in one packed row.

    No token sees another, so nothing but their own positions tells them apart.
    """
    device = next(model.parameters()).device
    recorder = CallRecorder()
    run_packed(
        model,
        tokens.repeat(len(positions)).to(device),
        torch.tensor(positions, device=device).repeat_interleave(len(tokens)),
        recorder,
        torch.zeros(1, dtype=torch.int64, device=device),
    )
    return recorder.calls


def _by_position(rows: Tensor, positions: list[int]) -> Tensor:
    """[positions, tokens, kv_heads, head_dim] float32, of keys or values of one packed row."""
    return rows.float().reshape(len(positions), -1, *rows.shape[1:])


def _frequencies(model: nn.Module) -> Iterator[tuple[float, ...]]:
    """List the frequencies of the model's rotary modules: one set per layer type in some."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dim() == 1:
            yield tuple(buffer.tolist())


def _candidates(frequencies: Iterable[tuple[float, ...]], head_dim: int) -> Iterator[Rotation]:
    """List rotations of the first dimensions of a head: paired by halves, or with the next one."""
    for each in frequencies:
        if 0 < 2 * len(each) <= head_dim:
            yield Rotation(each, interleaved=False)
            yield Rotation(each, interleaved=True)


def _error(rotation: Rotation | None, contexts: list[tuple[list[int], Tensor]]) -> float:
    """Measure how far vectors are from those at position 0, turned: the worst pair of dimensions.

    The error is relative to the pair's norm over all tokens and heads, and NaN where the vectors
    are. Each context has positions, the first of them 0, and vectors
    [positions, tokens, heads, head_dim].
    """
    start = contexts[0][1][0]  # [tokens, heads, head_dim], at position 0
    size = start.square().sum((0, 1))  # [head_dim]
    if rotation is not None:
        size = _by_pair(rotation, size)
    size = size.clamp_min(1e-3 * float(size.mean()) + 1e-12)  # tiny dimensions may be off
    errors = []
    for positions, vectors in contexts:
        for position, found in zip(positions, vectors, strict=True):
            expected = start
            if rotation is not None:
                offset = torch.tensor([position], device=start.device)
                expected = rotation.turn(start, *rotation.turns(offset))
            off = (found - expected).square().sum((0, 1))
            if rotation is not None:
                off = _by_pair(rotation, off)
            errors.append((off / size).amax())
    return float(torch.stack(errors).amax().sqrt())


def _by_pair(rotation: Rotation, squares: Tensor) -> Tensor:
    """Sum squares [head_dim] by pair: [pairs + the dimensions, with 0 for those of pairs]."""
    rest = squares.clone()
    pairs = squares[rotation.first] + squares[rotation.second]
    rest[rotation.first] = rest[rotation.second] = 0
    return torch.cat([pairs, rest])

"""What the rest of longctx may know of a model: plain values, found once when it is loaded."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """`window`: a query at p sees the keys in (p - window, p]; None: all up to p."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None


@dataclass(frozen=True, slots=True)
class Rotation:
    """Pairs of a head's first dimensions turn by `frequencies` [pairs], radians per position.

    A pair is two neighbours where they are `interleaved`, else one of the first half of all that
    turn and one of the second. The dimensions after these do not turn.
    """

    frequencies: tuple[float, ...]
    interleaved: bool

    @property
    def first(self) -> slice:
        pairs = len(self.frequencies)
        return slice(0, 2 * pairs, 2) if self.interleaved else slice(0, pairs)

    @property
    def second(self) -> slice:
        pairs = len(self.frequencies)
        return slice(1, 2 * pairs, 2) if self.interleaved else slice(pairs, 2 * pairs)

    def turns(self, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [offsets, 1, pairs], float32, of the turns by `offsets` [offsets]."""
        frequencies = torch.tensor(self.frequencies, dtype=torch.float64, device=offsets.device)
        angles = (offsets.double()[:, None] * frequencies)[:, None]
        return angles.cos().float(), angles.sin().float()

    def turn(self, vectors: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """`vectors` [tokens, heads, head_dim], turned in float32; cosines, sines as of `turns`."""
        turned = vectors.clone()
        x, y = vectors[..., self.first].float(), vectors[..., self.second].float()
        turned[..., self.first] = x * cosines - y * sines
        turned[..., self.second] = y * cosines + x * sines
        return turned


@dataclass(frozen=True, slots=True, kw_only=True)
class Relocation:
    """Whether keys can serve at other positions than they were encoded at, and how.

    `rotations` has one for each layer, None where keys do not know their position; it is empty
    where the model is not `shiftable`. `reason` is for people, in one line.
    """

    shiftable: bool
    reason: str
    rotations: tuple[Rotation | None, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What the rest of the engine may know of a model.

    `fingerprint` names configuration and weights as they are computed with; `rope_identity` names
    what of the rotary choice changes keys. With `dtype` they keep one model's KV from being taken
    for another's.
    """

    name: str
    architecture: str
    layers: tuple[LayerSpec, ...]
    relocation: Relocation  # whether keys may serve at other positions
    vocab_size: int
    max_context: int  # tokens, prompt and answer together
    dtype: torch.dtype
    device: torch.device
    fingerprint: str
    rope_identity: str
    weight_bytes: int

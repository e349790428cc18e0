"""What the rest of longctx may know of a model: plain values, found once when it is loaded."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """The shape of one layer's attention.

    With a `window` a query at position p sees the keys in (p - window, p]; a global
    (full-attention) layer has None and sees all keys up to p.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None


@dataclass(frozen=True, slots=True)
class Rotation:
    """How a layer rotates its keys: pairs of dimensions, by `frequencies` [pairs] per position.

    Frequencies are in radians. The pairs are the first dimensions of a head; the dimensions after
    them do not turn. With 3 pairs they are (0, 1), (2, 3), (4, 5) where `interleaved`, else
    (0, 3), (1, 4), (2, 5).
    """

    frequencies: tuple[float, ...]
    interleaved: bool

    @property
    def first(self) -> slice:
        """The first dimension of each pair."""
        pairs = len(self.frequencies)
        return slice(0, 2 * pairs, 2) if self.interleaved else slice(0, pairs)

    @property
    def second(self) -> slice:
        """The second dimension of each pair."""
        pairs = len(self.frequencies)
        return slice(1, 2 * pairs, 2) if self.interleaved else slice(pairs, 2 * pairs)

    def turns(self, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Compute cosines and sines [offsets, 1, pairs], float32, of turns by `offsets` [offsets].

        An offset is a number of positions, and may be negative.
        """
        frequencies = torch.tensor(self.frequencies, dtype=torch.float64, device=offsets.device)
        angles = (offsets.double()[:, None] * frequencies)[:, None]
        return angles.cos().float(), angles.sin().float()

    def turn(self, vectors: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Turn `vectors` [tokens, heads, head_dim], in float32, by what `turns` returns."""
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
    """The facts of a loaded model that the rest of longctx may know.

    `fingerprint` identifies the configuration and the weights as they are computed with;
    `rope_identity` identifies the rotary parameters that change keys. With `dtype` they keep one
    model's KV from being taken for another's.
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

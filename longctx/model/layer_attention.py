"""What a model's layers call for their attention: one seam between any model and any cache."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """How a layer calls its attention: the same for all rows of a step, and in every step.

    Scores are `scaling * q.k`, then `softcap * tanh(score / softcap)` where there is a softcap.
    `sinks` [heads] are logits that take part in the softmax and carry no value.
    """

    layer: int
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None


class NothingLeft(Exception):
    """Ends a forward pass from within: all keys and values are there, and no logits are wanted."""


class LayerAttention(Protocol):
    """Attention of one forward pass, called once by each layer, in order, from one thread."""

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the attention of all rows: [tokens, heads, head_dim] in the query's dtype.

        The last layer may raise NothingLeft instead, where there are no `logits_rows`.

        `query` [tokens, heads, head_dim]; `key`, `value` [tokens, kv_heads, head_dim], after RoPE;
        all may be strided views.
        """
        ...

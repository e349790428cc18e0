"""What a model's layers call for their attention: one seam between any model and any cache."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:  # there may be no compiled kernels
    from longctx.kernels._kernels import Attention, Layer, Plan


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """How a layer calls its attention: the same for all rows of a step, and in every step.

    Scores are `scaling * q.k`, then `softcap * tanh(score / softcap)` where there is a softcap.
    `sinks` [heads] are logits that take part in the softmax and carry no value. `merged` says that
    the result is merged with others, so that it must not be rounded yet.
    """

    layer: int
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    merged: bool = True


@dataclass(frozen=True, slots=True)
class Place:
    """Rows of a pool: `pool` [slots, 2, kv_heads, head_dim], the keys and values of a token.

    `slots` are those of the step's tokens, in order: a slice, or a tensor [tokens] int64.
    """

    pool: Tensor
    slots: slice | Tensor


class KernelPlan(ABC):
    """How a step attends in the layers of one group, as compiled kernels read it."""

    kernels: "Attention"
    chunks: "Plan"

    @abstractmethod
    def layer(self, layer: int, heads: int) -> "Layer":
        """Return where a layer's pages are, and how they are read by so many query heads."""


@dataclass(slots=True)
class KernelStep:
    """A step whose attention kernels may call by themselves, with the plan of each layer."""

    plans: Mapping[int, KernelPlan]
    seconds: float = 0.0  # that such attention took


class NothingLeft(Exception):
    """Ends a forward pass from within: all keys and values are there, and no logits are wanted."""


class LayerAttention(Protocol):
    """Attention of one forward pass, called once by each layer, in order, from one thread."""

    def place(self, layer: int) -> "Place | None":
        """Return where a layer may put its new keys and values, before `attend` is given them.

        Then `attend` does not write them again. None: it keeps them by itself.
        """
        ...

    def by_kernels(self) -> KernelStep | None:
        """Return what all layers may attend by in place of `attend`, once they have their places.

        None where `attend` does more than to attend, or no kernels do it.
        """
        ...

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the attention of all rows: [tokens, heads, head_dim] in the query's dtype.

        The last layer may raise NothingLeft instead, where there are no `logits_rows`.

        `query` [tokens, heads, head_dim]; `key`, `value` [tokens, kv_heads, head_dim], after RoPE;
        all may be strided views.
        """
        ...

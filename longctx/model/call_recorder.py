"""A model watched while it runs: how its layers call their attention, and with what."""

from dataclasses import dataclass

from torch import Tensor

from longctx.model.layer_attention import AttentionCall


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedCall:
    """One layer's call: `query` [tokens, heads, head_dim], `key` and `value` with their heads."""

    call: AttentionCall
    query: Tensor
    key: Tensor
    value: Tensor


class CallRecorder:
    """A `LayerAttention` that keeps each call, and under which no token sees another.

    The result is each token's own value, so that whatever still passes from token to token does
    so outside of the attention.
    """

    def __init__(self) -> None:
        self.calls: list[RecordedCall] = []  # in the order of the layers

    def place(self, layer: int) -> None:
        return None

    def by_kernels(self) -> None:
        return None

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return [tokens, heads, head_dim of the values]; heads need not be checked yet."""
        self.calls.append(RecordedCall(call=call, query=query, key=key, value=value))
        group = max(query.shape[1] // value.shape[1], 1)
        return value.repeat_interleave(group, dim=1)

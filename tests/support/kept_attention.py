"""An attention that computes nothing: what a layer hands to its own is seen."""

from torch import Tensor

from longctx.model.layer_attention import AttentionCall, Place


class Kept:
    """A `LayerAttention` with rows of its own, which keeps what it is handed."""

    def __init__(self, place: Place | None) -> None:
        self._place = place

    def place(self, layer: int) -> Place | None:
        return self._place

    def by_kernels(self) -> None:
        return None

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.query, self.key, self.value = query, key, value
        return query

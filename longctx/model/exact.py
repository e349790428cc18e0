"""A loaded model, computed in float32: what the rounding of its own type is measured against.

The weights are shared. Those of 16 bits are widened when an operation takes them, those of linear
layers piece by piece, and forgotten after it. It is as exact as a model that was loaded in float32,
and slower.
"""

from dataclasses import replace

import torch
from torch import Tensor

from longctx.model.layer_attention import LayerAttention
from longctx.model.loader import LoadedModel
from longctx.model.widened import Widened


def exact_twin(model: LoadedModel) -> LoadedModel:
    """Return the same model computed in float32; a model that does so already is its own twin."""
    return model if model.spec.dtype == torch.float32 else _Exact(model)


class _Exact(LoadedModel):
    """Its `spec` is the model's but for the type, so its pools and its logits are float32."""

    def __init__(self, model: LoadedModel) -> None:
        super().__init__(model.transformer, replace(model.spec, dtype=torch.float32))
        self._widened = Widened()

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: LayerAttention, logits_rows: Tensor
    ) -> Tensor:
        with self._widened:
            return super().forward(token_ids, positions, attention, logits_rows)

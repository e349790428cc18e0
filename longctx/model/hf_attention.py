"""The seam with Hugging Face: every layer's attention is one call of ours.

transformers lets a function be named as the attention of a model's layers. Ours hands queries,
keys and values to the `LayerAttention` that travels through the model as the keyword `batch`, so
that one row `[1, tokens]` may carry any number of sequences. No mask is made: the `LayerAttention`
decides which keys a query sees.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from longctx.model.layer_attention import AttentionCall, LayerAttention

ATTENTION = "longctx"


def register_attention() -> None:
    """Register `ATTENTION` with transformers; doing it twice changes nothing.

    It is registered without a mask function: transformers then makes no mask and passes None.
    """
    AttentionInterface.register(ATTENTION, attend_packed)


def run_packed(
    model: nn.Module,
    token_ids: Tensor,
    positions: Tensor,
    batch: object,
    logits_rows: Tensor,
) -> Tensor:
    """Run the model over one packed row and return logits [rows, vocab] of `logits_rows` [rows].

    `token_ids`, `positions` [tokens]; `batch` is handed to each layer's attention as it is.
    """
    output = model(
        input_ids=token_ids[None],
        position_ids=positions[None],
        use_cache=False,
        logits_to_keep=logits_rows,
        batch=batch,
    )
    logits: Tensor = output.logits[0]
    return logits


def attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    batch: LayerAttention,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,  # the probe has checked at load that none of the others matters
) -> tuple[Tensor, None]:
    """Let `batch` attend for one layer, as transformers calls the attention of a model.

    Returns [1, tokens, heads, head_dim]; query, key and value are [1, heads, tokens, head_dim].
    """
    layer = module.layer_idx
    assert isinstance(layer, int), f"{type(module).__name__} does not know its layer"
    call = AttentionCall(
        layer, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux
    )
    out = batch.attend(
        call, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    )
    return out[None].contiguous(), None  # some architectures call view() on it

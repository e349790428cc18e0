"""What a model's layers do with a few rows, such as those of a step that decodes, in few calls.

`FewRows` is one layer, in three calls around its attention. `LayerStack` is all layers in one call,
where kernels attend too; only what activates the gates is called from within. Both compute what
`FusedLayer` computes of more rows, to the last bit. Whatever does not change from step to step is
looked up once, and no tensor is made that is not handed on: in a small model such work takes as
long as the products.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longctx.kernels import _kernels
from longctx.model.call_recorder import CallRecorder
from longctx.model.hf_attention import run_packed
from longctx.model.layer_attention import KernelStep, LayerAttention
from longctx.model.rms_norm import RMSNorm

if TYPE_CHECKING:
    from longctx.model.cpu_layers import FusedAttention, FusedGate, FusedLayer

FEW_ROWS = 32  # more are worth a call for each part, and threads for the smallest
NO_NORM = (0, 0.0, False)
# Addresses of cosines and sines and how many there are of a token; then of a pool and of its slots,
# and the first slot, as `turn_heads` takes them; 0 is none. The step holds what they point to.
Position = tuple[int, int, int, int, int, int]
Angles = tuple[Tensor, Tensor]


class FewRows:
    """What a `FusedLayer` does with a few rows: three calls around its attention."""

    def __init__(
        self, norms: Sequence[RMSNorm], attention: "FusedAttention", unit: "FusedGate", width: int
    ) -> None:
        self.attention, self.activation, self.width = attention, unit.activation, width
        self._call, self.layer = attention.call, attention.call.layer
        self._norms = [*norms, *attention.norms]  # whose weights are read
        self.dtype = attention.last[0].dtype
        heads, kv_heads, dims = attention.heads
        self.inner = unit.last[0].in_features
        self._one_input, self.one_gate = len(attention.joined) == 1, len(unit.joined) == 1
        self._qkv = (heads + 2 * kv_heads) * dims
        told = [(each.factors.data_ptr(), each.epsilon, each.twice) for each in self._norms]
        query_norm, key_norm = told[2:] or (NO_NORM, NO_NORM)
        self.around = _kernels.AroundAttention(
            told[0],
            [each.packed for each in attention.joined],
            attention.last[0].packed,
            told[1],
            [each.packed for each in unit.joined],
            unit.last[0].packed,
            heads,
            kv_heads,
            dims,
            query_norm,
            key_norm,
            self.dtype == torch.bfloat16,
        )

    @classmethod
    def of(
        cls, norms: Sequence[RMSNorm], attention: "FusedAttention", unit: "FusedGate"
    ) -> "FewRows | None":
        """Return None where parts differ in type or width."""
        layers = [*attention.joined, *attention.last, *unit.joined, *unit.last]
        types = {each.dtype for each in (*layers, *norms, *attention.norms)}
        types |= {each.kernel_dtype for each in layers}
        width = attention.last[0].out_features
        if len(types) != 1 or any(norm.factors.shape[0] != width for norm in norms):
            return None
        try:
            return cls(norms, attention, unit, width)
        except ValueError:  # widths that do not follow from each other
            return None

    def takes(self, rows: Tensor) -> bool:
        return rows.shape[-2] <= FEW_ROWS and rows.dtype == self.dtype

    def forward(
        self,
        x: Tensor,
        *,
        batch: LayerAttention,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **others: Any,  # what the attention does not heed either
    ) -> Tensor:
        """Return [1, tokens, width] of rows of this shape."""
        attention, around, x = self.attention, self.around, x.contiguous()
        one, tokens, width = x.shape
        assert one == 1 and width == self.width
        angles = attention.angles(position_embeddings)
        position = attention.position(tokens, angles, batch, self.dtype)
        qkv = x.new_empty(tokens * self._qkv)
        around.to_attention(x.data_ptr(), tokens, qkv.data_ptr(), *position)
        query, key, value = self._parted(qkv, tokens)
        attended = batch.attend(self._call, query, key, value).contiguous()
        sums, out = torch.empty_like(x), torch.empty_like(x)
        gate, up, stride = self.gates(x)
        gates_at, sums_at = gate.data_ptr(), sums.data_ptr()
        around.to_gates(attended.data_ptr(), x.data_ptr(), tokens, sums_at, gates_at)
        activated = self.activation(gate).contiguous()
        assert attended.dtype == activated.dtype == self.dtype
        around.from_gates(activated.data_ptr(), up, stride, sums_at, tokens, out.data_ptr())
        return out

    def gates(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Make memory for the gates of rows, followed by that for what they pass.

        Returns the gates [tokens, inner], and of the others the address and the numbers from row to
        row.
        """
        tokens, inner = x.shape[1], self.inner
        if self.one_gate:
            gate = x.new_empty((tokens, 2 * inner))[:, :inner]
            behind, stride = inner, 2 * inner
        else:
            gate = x.new_empty((2, tokens, inner))[0]
            behind, stride = tokens * inner, inner
        return gate, gate.data_ptr() + behind * gate.element_size(), stride

    def _parted(self, qkv: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """View the inputs' results as queries, keys and values [tokens, heads, dims]."""
        heads, kv_heads, dims = self.attention.heads
        queries, kept = heads * dims, kv_heads * dims
        shape = (tokens, kv_heads, dims)
        if self._one_input:
            row, each = (self._qkv, dims, 1), 1
            query = qkv.as_strided((tokens, heads, dims), row)
        else:
            row, each = (kept, dims, 1), tokens
            query = qkv.as_strided((tokens, heads, dims), (queries, dims, 1))
        key = qkv.as_strided(shape, row, each * queries)
        return query, key, qkv.as_strided(shape, row, each * (queries + kept))


class LayerStack:
    """All layers of a model for a few rows, in one call of the first of them; the others pass on.

    Between the layers the model does nothing, and all turn heads by the same angles: `stack_layers`
    has seen it.
    """

    def __init__(self, layers: Sequence[FewRows]) -> None:
        self._layers = list(layers)
        self._last = layers[-1]
        # By whose form the angles are read: of a layer that heeds them, if one does
        turning = [each for each in layers if each.attention.turns]
        self._told = (turning or list(layers))[0].attention
        self._kernels: _kernels.Attention | None = None  # which the stack was made for
        self._stack: _kernels.LayerStack | None = None
        self._rows: Tensor | None = None  # of the last layer, while others pass them on

    def forward(
        self,
        layer: FewRows,
        x: Tensor,
        *,
        batch: LayerAttention,
        position_embeddings: Angles | None = None,
        **others: Any,  # what no attention heeds
    ) -> Tensor | None:
        """Return the rows that come out of the last layer; None where each layer has to compute."""
        if layer is self._layers[0]:
            step = batch.by_kernels()
            self._rows = None
            if step is not None:
                self._rows = self._through(x, batch, step, position_embeddings)
        rows = self._rows
        if rows is None:
            return None
        assert x is rows or layer is self._layers[0], "something happened between the layers"
        if layer is self._last:
            self._rows = None
        return rows

    def _through(
        self, x: Tensor, batch: LayerAttention, step: KernelStep, given: Angles | None
    ) -> Tensor:
        x, tokens, dtype = x.contiguous(), x.shape[1], self._last.dtype
        assert x.shape == (1, tokens, self._last.width)
        angles = self._told.angles(given)
        cosines, sines, turned, _, slots, first_slot = self._told.position(
            tokens, angles, batch, dtype
        )
        sums, y = torch.empty_like(x), torch.empty_like(x)
        gate, up, stride = self._last.gates(x)
        activations = [each.activation for each in self._layers]
        activated = gate  # held while the kernel reads it

        def activate(number: int) -> int:
            nonlocal activated
            activated = activations[number](gate).contiguous()
            assert activated.dtype == dtype
            address: int = activated.data_ptr()
            return address

        step.seconds += self._made_for(step, batch, tokens).run(
            [step.plans[each.layer].chunks for each in self._layers],
            x.data_ptr(),
            tokens,
            cosines,
            sines,
            turned,
            slots,
            first_slot,
            sums.data_ptr(),
            gate.data_ptr(),
            up,
            stride,
            y.data_ptr(),
            activate,
        )
        return y

    def _made_for(
        self, step: KernelStep, batch: LayerAttention, tokens: int
    ) -> _kernels.LayerStack:
        """Return the stack over the pools of this step, which are the same in every step."""
        kernels = step.plans[self._last.layer].kernels
        if self._stack is None or kernels is not self._kernels:
            layers = []
            for each in self._layers:
                call, heads = each.attention.call, each.attention.heads[0]
                _, _, _, pool, _, _ = each.attention.position(tokens, None, batch, each.dtype)
                pages = step.plans[each.layer].layer(each.layer, heads)
                turns, softcap = each.attention.turns, call.softcap or 0.0
                layers.append((each.around, pages, pool, turns, call.scaling, softcap))
            bfloat16 = self._last.dtype == torch.bfloat16
            self._stack = _kernels.LayerStack(kernels, layers, int(bfloat16))
            self._kernels = kernels
        return self._stack


def stack_layers(
    model: nn.Module, layers: Sequence["FusedLayer"], *, vocab_size: int
) -> LayerStack | None:
    """Let a model's fused layers be one stack, where nothing else happens between them.

    The model runs once while they are watched: each is given the very rows that the one before it
    returned, and all that turn heads the same angles. Returns None where that is not so.
    """
    given: list[tuple[nn.Module, Any, Any]] = []
    returned: dict[nn.Module, Any] = {}

    def before(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        rows = args[0] if args else keywords.get("hidden_states")
        given.append((module, rows, keywords.get("position_embeddings")))

    def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        returned[module] = result

    parts = [each.few_rows for each in layers]
    stacked = [each for each in parts if each is not None]
    if len(stacked) < 2 or len(stacked) < len(parts) or not _alike(stacked):
        return None
    handles = [each.register_forward_pre_hook(before, with_kwargs=True) for each in layers]
    handles += [each.register_forward_hook(after) for each in layers]
    try:
        tokens = torch.arange(2) % vocab_size
        run_packed(model, tokens, torch.arange(2), CallRecorder(), torch.tensor([1]))
    finally:
        for handle in handles:
            handle.remove()
    if [module for module, _, _ in given] != list(layers):
        return None
    chained = all(rows is returned[one] for (one, _, _), (_, rows, _) in pairwise(given))
    angles = [
        told for each, (_, _, told) in zip(stacked, given, strict=True) if each.attention.turns
    ]
    if not chained or any(told is not angles[0] for told in angles):
        return None
    stack = LayerStack(stacked)
    for each in layers:
        each.stack = stack
    return stack


def _alike(layers: Sequence[FewRows]) -> bool:
    """Say whether memory for the work of one layer does for all."""
    kinds = {(each.dtype, each.width, each.inner, each.one_gate) for each in layers}
    return len(kinds) == 1 and all(each.attention.call.sinks is None for each in layers)

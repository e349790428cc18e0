"""Parts of a model's layers in few calls, for CPUs: gated units, attention's ends, whole layers.

A step that decodes has one row or a few, and what transformers does around its products costs as
much as they do. Each part computes what the module computes whose place it takes, to the last bit;
`layer_fusing.py` puts it in where that was seen. Layers that map the same rows are one call; what a
few rows take is in `few_rows.py`.

The original stays: rows of another type than the layer's, as `exact.py` has them, go through it.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from longctx.kernels import _kernels
from longctx.model.few_rows import FewRows, LayerStack, Position, stack_layers
from longctx.model.layer_attention import LayerAttention
from longctx.model.layer_fusing import AttentionForm, LayerInPlace, fuse_layers
from longctx.model.packed_linear import LinearGroup, PackedLinear
from longctx.model.rms_norm import RMSNorm

HALVES = "halves"  # the n-th dim of a head and that half a head on are a pair


class FusedGate(nn.Module):
    """A gated linear unit: `output(activation(gate(x)) * up(x))`, gate and up in one call."""

    def __init__(
        self,
        original: nn.Module,
        joined: Sequence[PackedLinear],
        output: PackedLinear,
        activation: nn.Module,
    ) -> None:
        """`joined` are gate and up, or one layer that has the outputs of both, gates first."""
        super().__init__()
        self.original = original
        self.joined, self.last = list(joined), [output]  # in lists: they are the original's modules
        self._inputs, self._dtype = LinearGroup(joined), output.dtype
        # Bound once: torch looks modules up slowly, and calls them slowly
        self._output, self.activation = output.forward, activation.forward

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., width]."""
        if x.dtype != self._dtype:
            result: Tensor = self.original(x)
            return result
        inner = self._inputs.forward(x)
        gate, up = inner if len(inner) == 2 else inner[0].chunk(2, dim=-1)
        return self._output(self.activation(gate) * up).view(x.shape)


class FusedAttention(nn.Module):
    """A layer's attention, from rows to rows: queries, keys and values in one call.

    It hands them to the `LayerAttention` that travels as the keyword `batch`, as `hf_attention.py`
    does, by the call that the module in its place was seen to make.
    """

    def __init__(self, original: nn.Module, form: AttentionForm) -> None:
        super().__init__()
        self.original = original
        self.layer_idx, self.call, self.heads = form.call.layer, form.call, form.heads
        self.joined, self.last = list(form.joined), [form.last]  # as those of `FusedGate`
        self._inputs, self._dtype = LinearGroup(form.joined), form.last.dtype
        self._output = form.last.forward
        self.turns = form.style is not None
        self.norms = [] if form.norms is None else list(form.norms)  # of queries and of keys
        self._norms = [norm.forward for norm in self.norms]
        self._pool: Tensor | None = None  # where keys and values were kept last

    def forward(
        self,
        hidden_states: Tensor,
        *,
        batch: LayerAttention,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **others: Any,  # what the module in its place does not heed either
    ) -> tuple[Tensor, None]:
        """Return [1, tokens, width], and None for the weights that nobody keeps."""
        if hidden_states.dtype != self._dtype:
            out, _ = self.original(
                hidden_states=hidden_states,
                batch=batch,
                position_embeddings=position_embeddings,
                **others,
            )
            return out, None
        tokens = hidden_states.shape[-2]
        query, key, value = self.parted(self._inputs.forward(hidden_states), tokens)
        if self._norms:
            query, key = self._norms[0](query), self._norms[1](key)
        angles = self.angles(position_embeddings)
        self._turn(query, key, value, self.position(tokens, angles, batch, query.dtype))
        attended = batch.attend(self.call, query, key, value)
        return self._output(attended.reshape(1, tokens, -1)), None

    def parted(self, rows: Sequence[Tensor], tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """View the layers' results as queries, keys and values [tokens, heads, dims]."""
        heads, kv_heads, dims = self.heads
        if len(rows) == 3:
            query, key, value = rows
            shape = (tokens, kv_heads, dims)
            return query.view(tokens, heads, dims), key.view(shape), value.view(shape)
        each = rows[0].view(tokens, heads + 2 * kv_heads, dims)
        return each[:, :heads], each[:, heads : heads + kv_heads], each[:, heads + kv_heads :]

    def angles(self, given: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """Return the cosines and sines to turn by, as kernels read them, or None."""
        if given is None or not self.turns:
            return None
        return given[0].contiguous(), given[1].contiguous()

    def position(
        self,
        tokens: int,
        angles: tuple[Tensor, Tensor] | None,
        batch: LayerAttention,
        dtype: torch.dtype,
    ) -> Position:
        """Return what heads are turned by, and where keys and values are kept."""
        cosines, sines, turned = 0, 0, 0
        if angles is not None:
            turned = angles[0].shape[-1]
            for each in angles:
                assert each.dtype == dtype and each.numel() == tokens * turned
            cosines, sines = angles[0].data_ptr(), angles[1].data_ptr()
        place = batch.place(self.layer_idx)
        if place is None:
            return cosines, sines, turned, 0, 0, 0
        kept, slots = place.pool, place.slots
        if kept is not self._pool:  # the same in every step
            assert kept.is_contiguous() and kept.shape[1:] == (2, *self.heads[1:])
            assert kept.dtype == dtype
            self._pool = kept
        if isinstance(slots, slice):
            return cosines, sines, turned, kept.data_ptr(), 0, slots.start
        return cosines, sines, turned, kept.data_ptr(), slots.data_ptr(), 0

    def _turn(self, query: Tensor, key: Tensor, value: Tensor, position: Position) -> None:
        """Turn queries and keys in place, and put keys and values where they are kept."""
        tokens, heads, dims = query.shape
        _kernels.turn_heads(
            query.data_ptr(),
            query.stride(0),
            key.data_ptr(),
            key.stride(0),
            value.data_ptr(),
            value.stride(0),
            tokens,
            heads,
            key.shape[1],
            dims,
            *position,
            query.dtype == torch.bfloat16,
        )


class FusedLayer(LayerInPlace):
    """A layer whose first sum and its norm are one call, as are its parts where they are fused."""

    def __init__(
        self, original: nn.Module, norms: Sequence[RMSNorm], attention: nn.Module, unit: nn.Module
    ) -> None:
        super().__init__(original, norms, attention, unit)
        fused = isinstance(attention, FusedAttention), isinstance(unit, FusedGate)
        # Others may have hooks, so these are called as modules
        self._attention = attention.forward if fused[0] else attention
        self._unit = unit.forward if fused[1] else unit
        self._norm, self._norm_sum = norms[0].forward, norms[1].after_sum
        self.few_rows: FewRows | None = None
        self.stack: LayerStack | None = None  # of all layers, this one too
        if isinstance(attention, FusedAttention) and isinstance(unit, FusedGate):
            self.few_rows = FewRows.of(norms, attention, unit)

    def forward(self, hidden_states: Tensor, **keywords: Any) -> Tensor:
        """Return rows of the same shape; every keyword goes to the attention."""
        if self.few_rows is not None and self.few_rows.takes(hidden_states):
            if self.stack is not None:
                passed = self.stack.forward(self.few_rows, hidden_states, **keywords)
                if passed is not None:
                    return passed
            return self.few_rows.forward(hidden_states, **keywords)
        mixed, _ = self._attention(hidden_states=self._norm(hidden_states), **keywords)
        rows, normed = self._norm_sum(hidden_states, mixed)
        result: Tensor = rows + self._unit(normed)
        return result


class CPUParts:
    """The parts for `layer_fusing.py`, compared bit by bit in the model's own type."""

    linear: type[nn.Module] = PackedLinear
    norm: type[nn.Module] = RMSNorm
    styles: Sequence[Any] = (HALVES,)

    def context(self) -> nullcontext[None]:
        return nullcontext()

    def same(self, found: Tensor, wanted: Tensor) -> bool:
        return torch.equal(found, wanted)

    def gates(
        self, module: nn.Module, joined: Sequence[PackedLinear], last: PackedLinear
    ) -> Iterator[nn.Module]:
        for child in module.children():
            if child not in joined and child is not last and not list(child.parameters()):
                yield FusedGate(module, joined, last, child)

    def attention(self, module: nn.Module, form: AttentionForm) -> nn.Module:
        return FusedAttention(module, form)

    def layer(
        self,
        module: nn.Module,
        norms: Sequence[RMSNorm],
        attention: nn.Module,
        unit: nn.Module,
    ) -> nn.Module:
        return FusedLayer(module, norms, attention, unit)


def fuse_cpu_layers(model: nn.Module, *, vocab_size: int, max_context: int) -> None:
    """Replace the parts of a loaded model's layers that are recognized.

    Its norms and linear layers are ours already.
    """
    fuse_layers(model, CPUParts(), vocab_size=vocab_size, max_context=max_context)
    layers = [each for each in model.modules() if isinstance(each, FusedLayer)]
    with torch.inference_mode():
        stack_layers(model, layers, vocab_size=vocab_size)

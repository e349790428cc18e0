"""Parts of a model's layers in few launches, for GPUs: norms, gated units, attention's ends.

Each computes what the module computes whose place it takes; `layer_fusing.py` puts it in where that
was seen. Linear layers that map the same rows are one product over their joined weights. In
between, the kernels of `kernels/triton_layers.py` are one launch each.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor, nn

from longctx.kernels import triton_layers as kernels
from longctx.model.layer_attention import LayerAttention, Place
from longctx.model.layer_fusing import AttentionForm, LayerInPlace, fuse_layers
from longctx.model.norm_fusing import fuse_norms
from longctx.model.widened import Widened

TYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = 1e-4  # of the norm of what is compared: float32 sums in another order give 1e-6
INTERPRETED = bool(triton.knobs.runtime.interpret)
MOST_WIDTH = 16384  # of a norm: a row is held in registers
GATES_AT_ONCE = 1024
STYLES = (kernels.HALVES, kernels.NEIGHBORS, kernels.NEIGHBORS_TWICE)
ACTIVATIONS = (kernels.SILU, kernels.GELU_TANH, kernels.GELU)


class FusedNorm(nn.Module):
    """Computes `x / sqrt(mean(x^2) + epsilon) * weight` over the last dimension, in float32.

    Results have the type of `x`. They are rounded once, or before `weight` too where `twice` says.
    """

    def __init__(
        self,
        weight: Tensor,
        epsilon: float,
        *,
        dtype: torch.dtype = torch.float32,
        twice: bool = False,
    ) -> None:
        super().__init__()
        assert weight.numel() <= MOST_WIDTH
        self.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
        self.epsilon, self.twice = epsilon, twice
        self.factors = weight.detach().float().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each row of `x` [..., width] by itself, in one launch."""
        x = x.contiguous()
        out = torch.empty_like(x)
        self._launch(x, x, out, out, adds=False)
        return out

    def after_sum(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of two [..., width], rounded, and its norm, in one launch."""
        x, y = x.contiguous(), y.contiguous()
        assert x.shape == y.shape and x.dtype == y.dtype
        sums, out = torch.empty_like(x), torch.empty_like(x)
        self._launch(x, y, sums, out, adds=True)
        return sums, out

    def _launch(self, x: Tensor, y: Tensor, sums: Tensor, out: Tensor, *, adds: bool) -> None:
        width = self.factors.shape[0]
        assert x.shape[-1] == width
        padded = power_of_two(width)
        if not x.numel():
            return
        kernels.rms_norm[(x.numel() // width,)](
            x,
            y,
            self.factors,
            sums,
            out,
            width,
            self.epsilon,
            WIDTH_PAD=padded,
            ADDS=adds,
            TWICE=self.twice,
            BITS=INTERPRETED,
            num_warps=norm_warps(padded),
        )


class FusedGate(nn.Module):
    """A gated linear unit: `output(activation(gate(x)) * up(x))`, gate and up as one product."""

    def __init__(self, joined: nn.Linear, output: nn.Linear, activation: int) -> None:
        """`joined` has the gates first; `activation` is one of `ACTIVATIONS`."""
        super().__init__()
        self.joined, self.output, self._activation = joined, output, activation
        self._dtype = output.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., width] in three launches."""
        result: Tensor = self.output(self._gated(x))
        return result

    def add_to(self, rows: Tensor, x: Tensor) -> Tensor:
        """Add what `forward` gives to `rows`, in place: the product itself adds."""
        if self.output.bias is not None or rows.dtype != self._dtype:  # see widened.py
            return rows.add_(self.forward(x))
        gated = self._gated(x)
        width = rows.shape[-1]
        rows.view(-1, width).addmm_(gated.view(-1, gated.shape[-1]), self.output.weight.t())
        return rows

    def _gated(self, x: Tensor) -> Tensor:
        both: Tensor = self.joined(x)
        width = both.shape[-1] // 2
        out = both.new_empty((*both.shape[:-1], width))
        grid = (out.numel() // width, triton.cdiv(width, GATES_AT_ONCE))
        if out.numel():
            kernels.gate_rows[grid](
                both, out, width, BLOCK=GATES_AT_ONCE, KIND=self._activation, BITS=INTERPRETED
            )
        return out


class FusedAttention(nn.Module):
    """A layer's attention, from rows to rows: queries, keys and values as one product.

    It hands them to the `LayerAttention` that travels as the keyword `batch`, as `hf_attention.py`
    does, by the call that the module in its place was seen to make.
    """

    def __init__(self, joined: nn.Linear, form: AttentionForm) -> None:
        """`joined` is the form's, in one."""
        super().__init__()
        self.joined, self.output = joined, form.last
        self.layer_idx, self._call, self._heads = form.call.layer, form.call, form.heads
        self.sinks = form.call.sinks  # registered here too
        self._style, self._norms = form.style, form.norms
        self._factors = form.last.weight.new_empty(0, dtype=torch.float32)
        if form.norms is not None:
            self._factors = torch.stack([norm.factors for norm in form.norms])

    def forward(
        self,
        hidden_states: Tensor,
        *,
        batch: LayerAttention,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_: Any,  # what the module in its place did not heed either
    ) -> tuple[Tensor, None]:
        """Return [1, tokens, width], and None for the weights that nobody keeps."""
        heads, kv_heads, dims = self._heads
        rows = self.joined(hidden_states)[0]
        self._turn(rows, position_embeddings, batch.place(self.layer_idx))
        each = rows.view(len(rows), heads + 2 * kv_heads, dims)
        query, key = each[:, :heads], each[:, heads : heads + kv_heads]
        out = batch.attend(self._call, query, key, each[:, heads + kv_heads :])
        return self.output(out.reshape(1, len(rows), heads * dims)), None

    def _turn(
        self, rows: Tensor, embeddings: tuple[Tensor, Tensor] | None, place: Place | None
    ) -> None:
        """Make queries and keys ready in place, and put keys and values where they are kept."""
        heads, kv_heads, dims = self._heads
        cosines, sines, turned = rows, rows, 0
        if self._style is not None:
            assert embeddings is not None
            cosines, sines = (each.contiguous() for each in embeddings)
            turned = cosines.shape[-1]
            assert cosines.numel() == sines.numel() == len(rows) * turned
        if not len(rows) or (not turned and self._norms is None and place is None):
            return
        norm = None if self._norms is None else self._norms[0]
        pool, slots, begin = rows, rows, 0  # a kernel has to be given something
        listed = False
        if place is not None:
            pool = place.pool
            assert pool.is_contiguous() and pool.shape[1:] == (2, kv_heads, dims)
            if isinstance(place.slots, slice):
                begin = place.slots.start
            else:
                slots, listed = place.slots, True
        kernels.turn_heads[(len(rows), heads + kv_heads * (1 if place is None else 2))](
            rows,
            rows.stride(0),
            cosines,
            sines,
            self._factors,
            0.0 if norm is None else norm.epsilon,
            pool,
            slots,
            begin,
            HEADS=heads,
            KV_HEADS=kv_heads,
            D=dims,
            TURNED=turned,
            PAIRS_PAD=power_of_two(max(1, turned // 2)),
            REST_PAD=power_of_two(max(1, dims - turned)),
            STYLE=kernels.HALVES if self._style is None else self._style,
            NORMS=norm is not None,
            TWICE=norm is not None and norm.twice,
            PLACED=place is not None,
            LISTED=listed,
            BITS=INTERPRETED,
            num_warps=1,
        )


class FusedLayer(LayerInPlace):
    """A layer whose first sum and its norm are one launch, and whose last product may add."""

    before_unit: FusedNorm

    def forward(self, hidden_states: Tensor, **keywords: Any) -> Tensor:
        """Return rows of the same shape; every keyword goes to the attention."""
        normed = self.before_attention(hidden_states)
        mixed, _ = self.attention(hidden_states=normed, **keywords)
        rows, normed = self.before_unit.after_sum(hidden_states, mixed)
        if isinstance(self.unit, FusedGate):
            return self.unit.add_to(rows, normed)
        result: Tensor = rows + self.unit(normed)
        return result


class GPUParts:
    """The parts for `layer_fusing.py`, compared in float32.

    While a part is compared, the weights that it joins are held twice.
    """

    linear: type[nn.Module] = nn.Linear
    norm: type[nn.Module] = FusedNorm
    styles: Sequence[Any] = STYLES

    def context(self) -> Widened:
        return Widened()

    def same(self, found: Tensor, wanted: Tensor) -> bool:
        found, wanted = found.float(), wanted.float()
        return bool((found - wanted).norm() <= TOLERANCE * wanted.norm())

    def gates(
        self, module: nn.Module, joined: Sequence[nn.Linear], last: nn.Linear
    ) -> Iterator[nn.Module]:
        both = _join(joined)
        for activation in ACTIVATIONS:
            yield FusedGate(both, last, activation)

    def attention(self, module: nn.Module, form: AttentionForm) -> nn.Module:
        return FusedAttention(_join(form.joined), form)

    def layer(
        self,
        module: nn.Module,
        norms: Sequence[FusedNorm],
        attention: nn.Module,
        unit: nn.Module,
    ) -> nn.Module:
        return FusedLayer(module, norms, attention, unit)


def fuse_gpu_layers(model: nn.Module, *, vocab_size: int, max_context: int) -> None:
    """Replace a loaded model's norms, and the parts of its layers that are recognized."""
    fuse_norms(model, FusedNorm, types=TYPES, most_width=MOST_WIDTH)
    fuse_layers(model, GPUParts(), vocab_size=vocab_size, max_context=max_context)


def _join(linears: Sequence[nn.Linear]) -> nn.Linear:
    """Make one layer of several that map the same rows: its outputs are theirs, in order."""
    if len(linears) == 1:
        return linears[0]
    weight = torch.cat([each.weight for each in linears])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if any(each.bias is not None for each in linears):
        biases: list[Tensor] = [
            weight.new_zeros(each.out_features) if each.bias is None else each.bias
            for each in linears
        ]
        joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return joined


def norm_warps(padded: int) -> int:
    """Return how many warps share a row of a norm: each has 512 numbers, or 1,024 of long rows."""
    return max(1, min(16, padded // 512))


def power_of_two(count: int) -> int:
    """Return the smallest power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()

"""The compiled module of `csrc`. Addresses are plain numbers, and strides count values.

Callers keep the memory alive whose address they pass. Calls that compute release the interpreter
lock.
"""

from collections.abc import Callable
from typing import overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

def instruction_sets() -> list[str]:
    """List the instruction sets that this CPU has, the fastest last; empty if it has none."""
    ...

def attention_sets() -> list[str]:
    """List those that attention may use here: with them also those for queries in bfloat16."""
    ...

class Plan:
    """The chunks of one step, for all layers of a group; it keeps their arrays alive."""

    def __init__(self, window: int) -> None: ...
    def add(
        self,
        row_begin: int,
        rows: int,
        first_position: int,
        own_row: int,
        past_entries: int,
        own_pages: NDArray[np.int64],
        entries: NDArray[np.int64],
    ) -> None: ...

class Layer:
    """The pools and the shape of one layer, as `layer` makes it."""

def layer(
    codec: int,
    dtype: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    window: int,
    packed: int,
    packed_page_bytes: int,
    raw: int,
    raw_page_bytes: int,
) -> Layer: ...
def seal(layer: Layer, raw_pages: Tensor, packed_pages: Tensor) -> None:
    """Encode raw pages [n] into packed pages [n], both int64 indices on the CPU."""
    ...

class Attention:
    """Attention kernels of one instruction set, with their working memory: one call at a time."""

    def __init__(self, instruction_set: str) -> None: ...
    def attend(
        self,
        layer: Layer,
        plan: Plan,
        query: int,
        query_dtype: int,
        token_stride: int,
        head_stride: int,
        scaling: float,
        softcap: float,
        tokens: int,
        out: int,
        lse: int,
    ) -> None: ...

class LayerStack:
    """All layers of a model for a few rows, with their attention; see `csrc/module.cpp`."""

    def __init__(
        self,
        attention: Attention,
        layers: list[tuple[AroundAttention, Layer, int, bool, float, float]],
        dtype: int,
    ) -> None:
        """A layer's address is its raw pool's; then whether heads turn, scaling and softcap."""

    def run(
        self,
        plans: list[Plan],
        x: int,
        rows: int,
        cosines: int,
        sines: int,
        turned: int,
        slots: int,
        first_slot: int,
        sums: int,
        gates: int,
        up: int,
        up_stride: int,
        y: int,
        activate: Callable[[int], int],
    ) -> float:
        """Take rows through all layers; return the seconds that attention took.

        `activate` is told a layer's number and returns the address of its activated gates.
        """

class PackedLinear:
    """One packed linear layer; see `csrc/linear/linear.h`."""

    @overload
    def __init__(
        self,
        bias: int,
        outputs: int,
        inputs: int,
        storage: int,
        instruction_set: str,
        integers: bool,
    ) -> None: ...
    @overload
    def __init__(
        self,
        weight: int,
        bias: int,
        outputs: int,
        inputs: int,
        storage: int,
        instruction_set: str,
    ) -> None: ...
    def forward(self, x: int, rows: int, y: int) -> None: ...
    def fill(
        self,
        first: int,
        rows: int,
        codes: int,
        scales: int,
        common_scales: int,
        minima: int,
        common_minima: int,
    ) -> None: ...
    def rows(self, ids: int, count: int, weight: int) -> None: ...
    def unpack(self, weight: int) -> None: ...
    @property
    def bytes(self) -> int: ...

class LinearGroup:
    """Several packed layers over the same rows; `y` gets their results one after another."""

    def __init__(self, layers: list[PackedLinear]) -> None: ...
    def forward(self, x: int, rows: int, y: int) -> None: ...

def rms_norm_bfloat16(
    x: int,
    added: int,
    sums: int,
    rows: int,
    width: int,
    weight: int,
    epsilon: float,
    twice: bool,
    y: int,
) -> None: ...

class AroundAttention:
    """What a layer does around its attention, for a few rows; see `csrc/layers/around_attention.h`.

    A norm is the address of its weights, float32, which must outlive it, or 0 for none; its
    epsilon; and whether it rounds twice.
    """

    def __init__(
        self,
        before_attention: tuple[int, float, bool],
        inputs: list[PackedLinear],
        output: PackedLinear,
        before_unit: tuple[int, float, bool],
        gates: list[PackedLinear],
        last: PackedLinear,
        heads: int,
        kv_heads: int,
        dims: int,
        query_norm: tuple[int, float, bool],
        key_norm: tuple[int, float, bool],
        bfloat16: bool,
    ) -> None: ...
    def to_attention(
        self,
        x: int,
        rows: int,
        qkv: int,
        cosines: int,
        sines: int,
        turned: int,
        pool: int,
        slots: int,
        first_slot: int,
    ) -> None: ...
    def to_gates(self, attended: int, x: int, rows: int, sums: int, gates: int) -> None: ...
    def from_gates(
        self, activated: int, up: int, up_stride: int, sums: int, rows: int, y: int
    ) -> None: ...

def bfloat16_sets() -> list[str]: ...
def multiplies_integers() -> bool: ...
def rms_norm(
    x: int, added: int, sums: int, rows: int, width: int, weight: int, epsilon: float, y: int
) -> None: ...
def turn_heads(
    query: int,
    query_stride: int,
    key: int,
    key_stride: int,
    value: int,
    value_stride: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    dims: int,
    cosines: int,
    sines: int,
    turned: int,
    pool: int,
    slots: int,
    first_slot: int,
    bfloat16: bool,
) -> None:
    """Turn queries and keys in place, and keep keys and values; see `csrc/layers/heads.h`."""
    ...

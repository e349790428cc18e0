"""The compiled module; see csrc. Addresses are plain numbers, strides count values."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

def instruction_sets() -> list[str]: ...

class Plan:
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

class Layer: ...

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
def seal(layer: Layer, raw_pages: Tensor, packed_pages: Tensor) -> None: ...

class Attention:
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

class PackedLinear:
    def __init__(
        self,
        weight: int,
        scales: int,
        bias: int,
        outputs: int,
        inputs: int,
        storage: int,
        instruction_set: str,
    ) -> None: ...
    def forward(self, x: int, rows: int, y: int) -> None: ...
    def unpack(self, weight: int) -> None: ...
    @property
    def bytes(self) -> int: ...

def rms_norm(x: int, rows: int, width: int, weight: int, epsilon: float, y: int) -> None: ...

"""Fills a model with the tensors of a GGUF file, one after another.

The model is built without memory for its matrices; each is given its own as its tensor is read,
and what was read of the file is given back, so a model may be larger than half of the memory.
llama.cpp's converter has changed a few tensors: rows of queries and keys of Llama stand in another
order, and norms of Gemma have 1 added; that is undone here. Read `load_gguf`.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode

from longctx.errors import ModelRefused
from longctx.model.gguf_config import FREQUENCY_FACTORS, LONG_FACTORS, SHORT_FACTORS
from longctx.model.gguf_file import GgufFile, GgufTensor

# GGUF's names in transformers' words; those of a layer's modules without their layer.
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_LAYER = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
OWN = {
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    "gemma2": GEMMA_LAYER,
    "gemma3": GEMMA_LAYER,
}
LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
ROPE_TENSORS = (FREQUENCY_FACTORS, LONG_FACTORS, SHORT_FACTORS)  # in the configuration already
ONE_ADDED = ("gemma2", "gemma3")  # to the weights of norms
REORDERED = {"llama": ("attn_q", "attn_k"), "mistral": ("attn_q", "attn_k")}

# Takes a model, the path of a module and its weight; says whether it has taken care of that.
Keeper = Callable[[nn.Module, str, "Weight"], bool]


class Weight:
    """One tensor as the model wants it: its values, or its blocks in the order of their rows."""

    def __init__(self, tensor: GgufTensor, rows: NDArray[np.int64] | None, added: float) -> None:
        self.tensor = tensor
        self.rows = rows  # of the file, in the model's order; None where they are the same
        self._added = added

    def values(self) -> NDArray[np.float32]:
        """The tensor as float32, exactly as the file has it, in the model's order."""
        found = self.tensor.values()
        if self.rows is not None:
            found = found[self.rows]
        return found - np.float32(self._added) if self._added else found

    def blocks(self) -> NDArray[np.uint8]:
        """The quantized rows [rows, bytes] in the model's order."""
        found = self.tensor.blocks()
        return found if self.rows is None else found[self.rows]


def load_gguf(
    model_class: Any,
    settings: Any,
    file: GgufFile,
    dtype: torch.dtype,
    *,
    attention: str,
    keep: Keeper | None,
) -> nn.Module:
    """Build a model and fill it; raises ModelRefused for tensors that do not fit it.

    `keep` may replace a module whose weight it wants otherwise than as a parameter of `dtype`. It
    is asked for matrices only, when what has one dimension is in its place.
    """
    with _without_matrices():
        model: nn.Module = model_class._from_config(
            settings, dtype=dtype, attn_implementation=attention
        )
    names = _names(model, file)
    for name in sorted(names, key=lambda each: len(file.tensors[each].shape)):
        target = names[name]
        _fill(model, target, _weight(file, name, settings), dtype, keep)
        file.tensors[name].give_back()
    if settings.tie_word_embeddings:
        _tie(model)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, f"nothing fills {left}"
    return model


def _names(model: nn.Module, file: GgufFile) -> dict[str, str]:
    """Map each tensor to the parameter that it fills; each of either side has one of the other."""
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    layer_names = LAYER | OWN.get(file.architecture, {})
    names: dict[str, str] = {}
    for name, tensor in file.tensors.items():
        if name in ROPE_TENSORS:
            continue
        target = _target(name, layer_names)
        if target is None or target not in wanted:
            raise ModelRefused(
                f"{tensor.file.path}: nothing in a model of {file.architecture} takes the tensor "
                f"{name} at byte {tensor.offset:,}; it could not be served exactly"
            )
        shape = tuple(wanted.pop(target))
        if shape != tensor.shape:
            raise ModelRefused(
                f"{tensor.file.path}: the tensor {name} at byte {tensor.offset:,} has the shape "
                f"{list(tensor.shape)}, the configuration calls for {list(shape)}"
            )
        names[name] = target
    for target in wanted:
        raise ModelRefused(
            f"{file.path}: the tensor for {target} is missing ({len(wanted)} in all); download the "
            "model again"
        )
    return names


def _target(name: str, layer_names: dict[str, str]) -> str | None:
    match = LAYER_NAME.fullmatch(name)
    if match is None:
        module, _, kind = name.rpartition(".")
        return f"{TOP[module]}.{kind}" if module in TOP else None
    layer, module, kind = match.groups()
    return f"model.layers.{layer}.{layer_names[module]}.{kind}" if module in layer_names else None


def _weight(file: GgufFile, name: str, settings: Any) -> Weight:
    tensor = file.tensors[name]
    match = LAYER_NAME.fullmatch(name)
    module = match[2] if match else name.rpartition(".")[0]
    rows = None
    if module in REORDERED.get(file.architecture, ()):
        heads = settings.num_attention_heads
        rows = _turned_rows(
            tensor.shape[0], heads if module == "attn_q" else settings.num_key_value_heads
        )
    added = 1.0 if file.architecture in ONE_ADDED and module.endswith("norm") else 0.0
    return Weight(tensor, rows, added)


def _turned_rows(rows: int, heads: int) -> NDArray[np.int64]:
    """Which row of the file each row of the model is.

    llama.cpp turns neighbors (0, 1), (2, 3), ... of a head together, transformers the halves
    (0, n), (1, n + 1), ...: with heads of 4 the model's rows are 0, 2, 1, 3 of the file.
    """
    order = np.arange(rows).reshape(heads, rows // heads // 2, 2)
    return order.swapaxes(1, 2).reshape(-1)


def _fill(
    model: nn.Module, target: str, weight: Weight, dtype: torch.dtype, keep: Keeper | None
) -> None:
    path, _, kind = target.rpartition(".")
    module = model.get_submodule(path)
    matrix = kind == "weight" and len(weight.tensor.shape) > 1
    if matrix and keep is not None and keep(model, path, weight):
        return
    values = torch.from_numpy(np.ascontiguousarray(weight.values())).to(dtype)
    setattr(module, kind, nn.Parameter(values, requires_grad=False))


def _tie(model: Any) -> None:
    """Let the output layer use the embedding's weights, unless `keep` has seen to it."""
    if isinstance(model.lm_head, nn.Linear):
        model.lm_head.weight = model.model.embed_tokens.weight


class _Empty(TorchFunctionMode):
    """Makes matrices without memory (on `meta`); what is small or computed is as it is."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and len(_shape(args)) > 1:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _shape(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(args[0]) if args and isinstance(args[0], tuple | list | torch.Size) else args


@contextmanager
def _without_matrices() -> Iterator[None]:
    with _Empty():
        yield

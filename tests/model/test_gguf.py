"""A GGUF file serves as the model that it was made of; what is wrong with one is named."""

import struct
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as TensorType
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longctx.errors import ModelRefused
from longctx.model import loader
from longctx.model.gguf_file import PLAIN, QUANTIZED, read_gguf
from longctx.text.tokenizer import Tokenizer
from tests.support.plain_attention import (
    assert_equal_to_eager,
    load,
    packed_logits,
    some_tokens,
)
from tests.support.tiny_gguf import random_blocks, write_gguf
from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer

# Rows are whole blocks of 256, as some types have them.
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 16,
    "num_hidden_layers": 2,
}
GEMMA3 = {
    "query_pre_attn_scalar": 16,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
}


@pytest.mark.parametrize("kind", [*PLAIN, *QUANTIZED])
def test_every_type_of_tensor_serves_as_what_it_dequantizes_to(
    kind: TensorType, tmp_path: Path
) -> None:
    path = write_gguf(write_model(tmp_path / "exact", **WIDE), tmp_path / "model.gguf", kind)
    model = load(path, dtype="float32", device="cpu", activations="exact")
    assert_equal_to_eager(path.with_suffix(""), model, torch.float64)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_rows_of_16_bits_change_logits_a_hundredth_of_what_bfloat16_does(
    kind: TensorType, tmp_path: Path
) -> None:
    path = write_gguf(write_model(tmp_path / "exact", **WIDE), tmp_path / "model.gguf", kind)
    tokens = some_tokens(90, 1)
    logits, models = {}, {}
    for name, settings in (
        ("exact", {"dtype": "float32", "activations": "exact"}),
        ("served", {"dtype": "float32"}),
        ("bfloat16", {"dtype": "bfloat16", "activations": "exact"}),
    ):
        models[name] = load(path, device="cpu", **settings)
        (logits[name],) = packed_logits(models[name], [tokens])
    served, narrow = ((logits[name] - logits["exact"]).norm() for name in ("served", "bfloat16"))
    assert served < narrow / 100
    # So little is enough to make other keys, which must not be taken for one another
    rounds = models["served"].rounds_rows
    assert rounds == bool(served > 0) and not models["exact"].rounds_rows
    assert rounds == (models["served"].spec.fingerprint != models["exact"].spec.fingerprint)


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": False, "head_dim": 32}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma2", {"tie_word_embeddings": True}),
        ("gemma3_text", {"tie_word_embeddings": True, **GEMMA3}),
        ("phi3", {}),
        ("phi3", {"sliding_window": 24}),
    ],
)
def test_every_architecture_serves_as_its_folder_does(
    architecture: str, overrides: dict[str, object], tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "exact", architecture, **overrides)
    path = write_gguf(folder, tmp_path / "model.gguf")
    assert_equal_to_eager(folder, load(path, device="cpu"))
    assert load(path, device="cpu").spec.layers == load(folder, device="cpu").spec.layers


@pytest.mark.parametrize("kind", [*PLAIN, *QUANTIZED])
def test_values_are_those_of_the_formats_own_package(kind: TensorType, tmp_path: Path) -> None:
    path = write_gguf(write_model(tmp_path / "exact", **WIDE), tmp_path / "model.gguf", kind)
    tensors = read_gguf(path).tensors
    for tensor in gguf.GGUFReader(path).tensors:
        wanted = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(tensors[tensor.name].values(), wanted.reshape(tensor.shape[::-1]))


def write_tiny(tmp_path: Path, **changes: object) -> Path:
    folder = write_model(tmp_path / "exact", num_hidden_layers=1)
    write_tokenizer(folder)
    return write_gguf(folder, tmp_path / "tiny.gguf", **changes)


def test_a_folder_with_one_file_is_that_file(tmp_path: Path) -> None:
    path = write_tiny(tmp_path)
    alone = tmp_path / "folder"
    alone.mkdir()
    moved = path.rename(alone / "tiny.gguf")
    by_folder, by_file = load(alone, device="cpu").spec, load(moved, device="cpu").spec
    assert by_folder.fingerprint == by_file.fingerprint
    assert by_file.name == "tiny"
    (alone / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelRefused, match=r"several models: other.gguf, tiny.gguf"):
        load(alone)


def test_the_fingerprint_is_the_files(tmp_path: Path) -> None:
    path = write_tiny(tmp_path)
    before = load(path, device="cpu").spec.fingerprint
    renamed = path.rename(tmp_path / "renamed.gguf")
    assert load(renamed, device="cpu").spec.fingerprint == before
    with renamed.open("r+b") as file:
        file.seek(-1, 2)
        (last,) = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert load(renamed, device="cpu").spec.fingerprint != before


def test_shards_serve_as_one_file_and_a_missing_one_is_named(tmp_path: Path) -> None:
    path = write_tiny(tmp_path)
    reader = gguf.GGUFReader(path)
    names = [tensor.name for tensor in reader.tensors]
    shards = [tmp_path / f"split-{number:05}-of-00002.gguf" for number in (1, 2)]
    for number, (shard, chosen) in enumerate(zip(shards, (names[::2], names[1::2]), strict=True)):
        writer = gguf.GGUFWriter(shard, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(names))
        if number == 0:
            for key, field in reader.fields.items():
                if key.startswith(("llama.", "tokenizer.")):
                    kind = field.types[0]
                    part = field.types[-1] if len(field.types) > 1 else None
                    writer.add_key_value(key, field.contents(), kind, part)
        for tensor in reader.tensors:
            if tensor.name in chosen:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    for shard in shards:  # either names them all
        assert_equal_to_eager(tmp_path / "exact", load(shard, device="cpu"))
    assert load(shards[0], device="cpu").spec.name == "split"
    assert Tokenizer(shards[1]).encode("The harbour")
    shards[1].unlink()
    with pytest.raises(ModelRefused, match=r"lacks split-00002-of-00002.gguf, one of 2 shards"):
        load(shards[0])


def cut_a_tensor(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def other_format(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + path.read_bytes())


def old_version(path: Path) -> None:
    path.write_bytes(b"GGUF" + struct.pack("<I", 1) + path.read_bytes()[8:])


def endless_list(path: Path) -> None:
    path.write_bytes(
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"x" + struct.pack("<IIQ", 9, 0, 2**60)
    )


def empty(path: Path) -> None:
    path.write_bytes(b"")


def no_tensors(path: Path) -> None:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_a_tensor, r"is truncated: the tensor [\w.]+ is bytes [\d,]+ to [\d,]+, and the file"),
        (cut_the_header, r"truncated or corrupt: its header needs [\d,]+ bytes at byte [\d,]+"),
        (other_format, r"is no GGUF file: it begins with b'PK"),
        (old_version, r"GGUF of version 1, and longctx reads 2 and 3"),
        (endless_list, r"header needs 1,152,921,504,606,846,976 bytes"),
        (empty, r"is no GGUF file"),
        (no_tensors, r"names no architecture"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_in_one_line(
    damage: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    path = write_tiny(tmp_path)
    damage(path)
    for use in (load, Tokenizer):
        with pytest.raises(ModelRefused, match=words) as refused:
            use(path)
        assert "\n" not in str(refused.value)


def test_a_header_of_any_bytes_is_refused_and_nothing_worse(tmp_path: Path) -> None:
    path = write_tiny(tmp_path)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    served = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for at in generator.integers(4, 2000, 3):
            damaged[at] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            read_gguf(path)
            served += 1
        except ModelRefused:
            pass
    assert served < 300


def test_what_is_not_known_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=r"states llama.expert_count = 8, which longctx does"):
        load(write_tiny(tmp_path / "a", expert_count=8))
    with pytest.raises(ModelRefused, match=r"scaling of the type 'ntk'"):
        load(write_tiny(tmp_path / "b", **{"rope.scaling.type": "ntk"}))
    with pytest.raises(ModelRefused, match=r"embedding_length is 'wide', where a number belongs"):
        load(write_tiny(tmp_path / "c", embedding_length="wide"))


def rewrite(path: Path, change: Callable[[gguf.GGUFWriter], None], *, leave: str = "") -> Path:
    """The same file with other tensors: without `leave`, and with what `change` adds."""
    reader = gguf.GGUFReader(path)
    other = path.with_name("rewritten.gguf")
    writer = gguf.GGUFWriter(other, "llama")
    for key, field in reader.fields.items():
        if key.startswith(("llama.", "tokenizer.")):
            part = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], part)
    for tensor in reader.tensors:
        if tensor.name != leave:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return other


def test_a_tensor_too_many_or_too_few_or_of_another_type_is_named(tmp_path: Path) -> None:
    path = write_tiny(tmp_path)

    def add(name: str, data: np.ndarray, kind: TensorType) -> Callable[[gguf.GGUFWriter], None]:
        return lambda writer: writer.add_tensor(name, data, raw_dtype=kind)

    extra = add("blk.0.router.weight", np.zeros((4, 64), np.float32), TensorType.F32)
    with pytest.raises(ModelRefused, match=r"takes the tensor blk.0.router.weight at byte"):
        load(rewrite(path, extra))
    with pytest.raises(ModelRefused, match=r"model.layers.0.mlp.down_proj.weight is missing"):
        load(rewrite(path, lambda writer: None, leave="blk.0.ffn_down.weight"))
    narrow = add("blk.0.ffn_down.weight", np.zeros((64, 64), np.float32), TensorType.F32)
    with pytest.raises(ModelRefused, match=r"the shape \[64, 64\], the configuration calls for"):
        load(rewrite(path, narrow, leave="blk.0.ffn_down.weight"))
    blocks = np.zeros((64, 56), np.uint8)
    other = add("blk.0.ffn_down.weight", blocks, TensorType.IQ1_M)
    with pytest.raises(ModelRefused, match=r"is of type IQ1_M; longctx reads F32"):
        load(rewrite(path, other, leave="blk.0.ffn_down.weight"))


def test_llama_3_scaling_written_out_is_the_scaling(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = write_model(tmp_path / "exact", rope_parameters=rope)
    plain = write_gguf(folder, tmp_path / "plain.gguf")
    config = AutoConfig.from_pretrained(folder)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    base = config.rope_parameters["rope_theta"]
    unscaled = 1.0 / base ** (torch.arange(0, 16, 2) / 16)
    factors = (unscaled / scaled).numpy().astype(np.float32)
    path = rewrite(plain, lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    assert_equal_to_eager(folder, load(path, device="cpu"))


def test_random_blocks_are_of_a_models_magnitude() -> None:
    blocks = random_blocks((4, 256), TensorType.Q6_K, np.random.default_rng(0))
    values = gguf.dequantize(blocks, TensorType.Q6_K)
    assert 0.01 < np.abs(values).mean() < 1


class RowsWidened(torch.nn.Module):
    """Gives a float32 layer the rows in float32, and rounds what comes to the rows' type."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        wide: torch.Tensor = self.layer(rows.float())
        return wide.to(rows.dtype)


def test_another_type_of_numbers_has_the_values_rounded_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "exact", **WIDE)
    path = write_gguf(folder, tmp_path / "model.gguf", TensorType.Q4_K)
    narrow = load(path, dtype="bfloat16", device="cpu", activations="exact")
    # Layers as transformers has them, so that their parts can be exchanged below
    monkeypatch.setattr(loader, "_layer_fusing", lambda *_: None)
    exact = load(path.with_suffix(""), dtype="bfloat16", device="cpu")
    assert narrow.spec.dtype == torch.bfloat16
    unfused = load(path, dtype="bfloat16", device="cpu", activations="exact").transformer
    linears = {
        name: layer
        for name, layer in exact.transformer.named_modules()
        if type(layer) in exact.linear_types
    }
    for name, layer in linears.items():
        assert torch.equal(unfused.get_submodule(name).weight, layer.weight)
    kernels = sys.modules.get("longctx.kernels._kernels")
    if kernels is not None and not kernels.bfloat16_sets():
        # This processor multiplies the file's values, not rounded, with rows that are widened
        wide = load(path, dtype="float32", device="cpu", activations="exact").transformer
        for name in linears:
            exact.transformer.set_submodule(name, RowsWidened(wide.get_submodule(name)))
    tokens = [some_tokens(9, 0)]
    assert torch.equal(packed_logits(narrow, tokens)[0], packed_logits(exact, tokens)[0])


def test_without_kernels_torch_computes_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(
        write_model(tmp_path / "exact", **WIDE, tie_word_embeddings=True),
        tmp_path / "model.gguf",
        TensorType.Q4_1,
    )
    monkeypatch.setitem(sys.modules, "longctx.model.packed_linear", None)  # as if not installed
    model = load(path, dtype="float32", device="cpu")
    assert not any(each.__name__ == "PackedLinear" for each in model.linear_types)
    assert_equal_to_eager(path.with_suffix(""), model)


def test_weights_may_be_rounded_further(tmp_path: Path) -> None:
    pytest.importorskip("longctx.kernels._kernels")
    folder = write_model(tmp_path / "exact", **WIDE)
    path = write_gguf(folder, tmp_path / "model.gguf", TensorType.Q6_K)
    own, rounded = (
        load(path, dtype="float32", device="cpu", weights=weights).spec
        for weights in ("auto", "int8")
    )
    assert rounded.weight_bytes < own.weight_bytes
    assert rounded.fingerprint != own.fingerprint


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_takes_no_memory_of_its_own_where_it_is_tied(
    tied: bool, tmp_path: Path
) -> None:
    pytest.importorskip("longctx.kernels._kernels")
    folder = write_model(tmp_path / "exact", **WIDE, tie_word_embeddings=tied)
    path = write_gguf(folder, tmp_path / "model.gguf", TensorType.Q8_0)
    matrices = [tensor for tensor in read_gguf(path).tensors.values() if len(tensor.shape) > 1]
    vectors = [tensor for tensor in read_gguf(path).tensors.values() if len(tensor.shape) == 1]
    assert any(tensor.name == "output.weight" for tensor in matrices) != tied
    weight_bytes = load(path, dtype="float32", device="cpu").spec.weight_bytes
    assert weight_bytes == sum(tensor.byte_count for tensor in (*matrices, *vectors))


def test_a_quantized_gemma_scales_its_embedding(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "exact", "gemma2", tie_word_embeddings=True)
    path = write_gguf(folder, tmp_path / "model.gguf", TensorType.Q8_0)
    model = load(path, dtype="float32", device="cpu", activations="exact")
    assert_equal_to_eager(path.with_suffix(""), model)

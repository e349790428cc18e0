"""Every backend seals a block into the same bytes: those that the codec's `encode` gives."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.codec import CODECS
from compress.shape import KVShape
from longctx.attention.registry import BACKENDS
from longctx.errors import ModelRefused
from longctx.kv.memory import KVMemory
from longctx.model.spec import LayerSpec
from tests.conformance.test_codecs import kinds, rows, shapes

PAGES = 6
EVERY_BACKEND_READS = {"raw", "bf16", "int8", "int4"}


def memory_of(codec: str, shape: KVShape) -> KVMemory:
    spec = LayerSpec(
        heads=shape.kv_heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim, window=None
    )
    return KVMemory(
        [spec, spec],
        dtype=shape.dtype,
        device=torch.device("cpu"),
        codec=codec,
        pool_bytes=2 * PAGES * CODECS[codec](shape).page_bytes,
        step_blocks=PAGES,
    )


def readable_codecs(backend: str) -> set[str]:
    """The codecs whose pages a backend can read; of the others it refuses the pools."""
    shape = KVShape(kv_heads=1, head_dim=64, dtype=torch.float32)
    readable = set()
    for codec in CODECS:
        with suppress(ModelRefused):
            BACKENDS[backend](memory_of(codec, shape))
            readable.add(codec)
    return readable


READABLE = {name: sorted(readable_codecs(name)) for name in sorted(BACKENDS)}


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_a_backend_reads_at_least_the_codecs_that_the_compiled_one_does(name: str) -> None:
    assert set(READABLE[name]) >= EVERY_BACKEND_READS


def filled(memory: KVMemory, content: Tensor) -> None:
    """Put two blocks of rows into raw pages 4 and 5 of layer 1."""
    memory.raw.pages[1][4:6] = content.flatten(1).view(torch.uint8)


def pages_of(numbers: tuple[int, ...]) -> Tensor | slice:
    if numbers[1] == numbers[0] + 1:
        return slice(numbers[0], numbers[1] + 1)
    return torch.tensor(numbers)


@pytest.mark.parametrize("name", sorted(BACKENDS))
@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    shape=shapes(),
    seed=st.integers(0, 1000),
    oddities=kinds(),
    packed=st.permutations(range(1, PAGES)).map(lambda pages: (pages[0], pages[1])),
)
def test_a_sealed_page_is_what_encode_gives(
    name: str,
    data: st.DataObject,
    shape: KVShape,
    seed: int,
    oddities: list[str],
    packed: tuple[int, int],
) -> None:
    codec = data.draw(st.sampled_from(READABLE[name]))
    memory = memory_of(codec, shape)
    content = rows(shape, seed, *oddities)
    filled(memory, content)
    BACKENDS[name](memory).seal(1, slice(4, 6), pages_of(packed))
    expected = torch.zeros_like(memory.packed_pages(1))
    expected[list(packed)] = memory.codecs[1].encode(content)
    assert torch.equal(memory.packed_pages(1), expected)
    assert not memory.packed_pages(0).any()


@pytest.mark.parametrize(
    ("name", "codec"), [(name, codec) for name, codecs in READABLE.items() for codec in codecs]
)
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf, 3e38], ids=str)
def test_broken_rows_are_sealed_alike(name: str, codec: str, bad: float) -> None:
    shape = KVShape(kv_heads=2, head_dim=80, dtype=torch.float32)
    memory = memory_of(codec, shape)
    content = rows(shape, 0)
    content[:, ::7, :, :, 3] = bad
    filled(memory, content)
    BACKENDS[name](memory).seal(1, torch.tensor([5, 4]), slice(1, 3))
    sealed = memory.packed_pages(1)[[2, 1]]
    expected = memory.codecs[1].encode(content)
    if codec == "bf16":  # a NaN may be written in several ways
        got, wanted = sealed.view(torch.bfloat16), expected.view(torch.bfloat16)
        torch.testing.assert_close(got, wanted, equal_nan=True, rtol=0, atol=0)
    else:
        assert torch.equal(sealed, expected)


def test_a_model_whose_head_dim_a_codec_has_no_layout_for_is_refused() -> None:
    shape = KVShape(kv_heads=2, head_dim=20, dtype=torch.float32)
    assert memory_of("raw", shape).capacity_tokens > 0
    spec = LayerSpec(heads=2, kv_heads=2, head_dim=20, window=None)
    with pytest.raises(ModelRefused, match=r"head_dim=20 does not fit .* use --kv-codec raw"):
        KVMemory(
            [spec],
            dtype=torch.float32,
            device=torch.device("cpu"),
            codec="int8",
            pool_bytes=1 << 20,
            step_blocks=2,
        )

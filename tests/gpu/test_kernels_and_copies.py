"""What a GPU computes and copies is what a CPU does; on a CPU the kernels are interpreted."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from compress.codec import CODECS
from longctx.attention.reference import ReferenceAttention
from longctx.kv.open_store import pinned
from longctx.kv.transfer import PageTransfer
from longctx.model.layer_attention import AttentionCall
from offload.arena import paged
from offload.block_pool import BlockPool
from offload.eviction import LRU
from offload.host import HostTier
from offload.key import GroupKey
from tests.conformance.test_backends import Case, build
from tests.gpu.devices import DEVICES, INTERPRET
from tests.offload.memory_disk import chain

pytest.importorskip("triton", reason="pip install triton, to test the kernels for GPUs")
with pytest.MonkeyPatch.context() as patch:  # Triton's decorators read it, when they are used
    patch.setenv("TRITON_INTERPRET", INTERPRET)
    from longctx.attention.cuda_backend import CUDAAttention

# numpy, which interprets, warns of NaN and infinity where a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

TOLERANCES = {"cpu": 4e-5, "cuda": 2e-2}  # products of a GPU are of 16 bits, or rounded inputs
CASES = {
    "decode": Case("raw", None, 8, 2, 64, ((130, 1), (64, 1)), True, None, 0),
    "split": Case("raw", None, 4, 1, 64, ((1100, 1),), True, None, 0),
    "question": Case("raw", 200, 8, 2, 128, ((700, 20),), False, 5.0, 0),
    "chunk": Case("raw", None, 4, 1, 64, ((130, 150),), False, None, 0),
}


@pytest.fixture(scope="module", autouse=True)
def _interpreted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", INTERPRET)
        yield


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("name", sorted(CASES))
def test_attention_equals_reference(name: str, codec: str, device: str) -> None:
    case = replace(CASES[name], codec=codec)
    memory, chunks, query = build(case, device=device)
    backend, reference = CUDAAttention(memory), ReferenceAttention(memory)
    call = AttentionCall(0, 0.1, case.softcap)
    out, lse = backend.attend(call, query, backend.plan(chunks, 0))
    expected_out, expected_lse = reference.attend(call, query, reference.plan(chunks, 0))
    tolerance = TOLERANCES[device]
    torch.testing.assert_close(lse, expected_lse, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(out, expected_out, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codec", sorted(CODECS))
def test_sealed_pages_have_the_bytes_that_a_cpu_gives_them(codec: str, device: str) -> None:
    memory, _, _ = build(
        Case(codec, None, 4, 2, 64, ((0, 200),), False, None, 0), torch.bfloat16, device
    )
    raw, packed = torch.tensor([2, 1], device=device), torch.tensor([1, 3], device=device)
    rows = memory.raw_rows(0).view(-1, *memory.codecs[0].shape.rows)[raw]
    expected = memory.codecs[0].encode(rows.cpu())
    CUDAAttention(memory).seal(0, raw, packed)
    assert torch.equal(memory.packed_pages(0)[packed].cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_pages_come_back_from_slabs_of_host_memory(device: str) -> None:
    page_bytes = (96 * 1024, 64 * 1024)
    pool = BlockPool(page_bytes=page_bytes, num_pages=20, device=torch.device(device))
    pages = pool.allocate(12)
    for layer in pool.pages:
        layer.copy_(torch.randint(256, layer.shape, dtype=torch.uint8))
    before = [layer[pages].cpu() for layer in pool.pages]
    transfer = PageTransfer(pool, staged=True)
    host = HostTier(
        capacity_bytes=1 << 22,
        page_bytes=page_bytes,
        policy=LRU[GroupKey](),
        allocate=pinned if device == "cuda" else paged,
        slab_bytes=1 << 18,
    )
    run = chain(1, 12)
    slots, ready = transfer.outgoing(pages)
    while not ready():
        pass
    assert host.put(0, run.keys, slots, parent=None, cost_seconds=1.0, retained=False) == 12
    for layer in pool.pages:
        layer.zero_()
    incoming = transfer.incoming(pages)
    assert all(host.read(0, run.keys, incoming))
    transfer.arrived(incoming, pages)
    for layer, content in zip(pool.pages, before, strict=True):
        assert torch.equal(layer[pages].cpu(), content)

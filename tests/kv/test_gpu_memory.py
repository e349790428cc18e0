"""What a GPU's free memory is shared into. No GPU is needed: what it has free is said here."""

import pytest
import torch

from longctx.errors import ModelRefused
from longctx.kv.memory import KVMemory, pool_bytes, raw_pool_bytes
from longctx.model.spec import LayerSpec
from offload.units import GIB

GPU = torch.device("cuda")


def test_the_pool_leaves_room_for_what_is_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20 * GIB, 24 * GIB))
    assert pool_bytes(None, GPU, beside_bytes=3 * GIB) == 15 * GIB
    assert pool_bytes(2, GPU, beside_bytes=3 * GIB) == 2 * GIB


def test_a_gpu_without_room_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * GIB, 24 * GIB))
    with pytest.raises(ModelRefused, match=r"2\.0 GiB free .* takes 3\.0 GiB .*--max-batch-tokens"):
        pool_bytes(None, GPU, beside_bytes=3 * GIB)


def test_the_raw_pool_is_as_large_as_was_said() -> None:
    layers = [
        LayerSpec(heads=4, kv_heads=2, head_dim=64, window=None),
        LayerSpec(heads=4, kv_heads=1, head_dim=80, window=100),
    ]
    memory = KVMemory(
        layers,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        codec="raw",
        pool_bytes=1 << 20,
        step_blocks=5,
    )
    made = sum(pool.nbytes for pool in memory.raw.pages)
    assert made == raw_pool_bytes(layers, torch.bfloat16, 5)

"""The attention backends that this installation has, by the names of `--attention-backend`.

To add one: a class that fulfils `AttentionBackend`, one line here, and its name in
`longctx/config.py`. The conformance tests run over all that are listed.
"""

import os

import torch

from longctx.attention.backend import BackendFactory
from longctx.attention.reference import ReferenceAttention
from longctx.attention.torch_backend import TorchAttention
from longctx.errors import ModelRefused

BACKENDS: dict[str, BackendFactory] = {
    "reference": ReferenceAttention,
    "torch": TorchAttention,
}
try:  # compiled where there is a compiler, for x86-64
    from longctx.attention.cpu_backend import CPUAttention
except ImportError:
    pass
else:
    BACKENDS["cpu"] = CPUAttention


def _interprets_triton() -> bool:
    """Whether Triton's kernels are interpreted on a CPU, as tests of them are."""
    return os.environ.get("TRITON_INTERPRET") == "1"


if torch.cuda.is_available() or _interprets_triton():  # importing Triton takes a while
    try:
        from longctx.attention.cuda_backend import CUDAAttention
    except ImportError:
        pass
    else:
        BACKENDS["cuda"] = CUDAAttention


def backend_for(name: str, device: torch.device) -> str:
    """Resolve the name of a backend; `auto` is the fastest that this installation has.

    Raises ModelRefused for one that does not work on the device, or is not installed.
    """
    if name == "cpu" and device.type != "cpu":
        raise ModelRefused(f"attention_backend 'cpu' cannot work on {device}; use torch or auto")
    if name == "cpu" and "cpu" not in BACKENDS:
        raise ModelRefused(
            "attention_backend 'cpu' needs the compiled kernels, which are not installed; use "
            "torch or auto"
        )
    if name == "cuda" and device.type != "cuda" and not _interprets_triton():
        raise ModelRefused(f"attention_backend 'cuda' cannot work on {device}; use torch or auto")
    if name == "cuda" and "cuda" not in BACKENDS:
        raise ModelRefused(
            "attention_backend 'cuda' needs Triton, which is not installed: pip install triton; or "
            "use torch or auto"
        )
    if name != "auto":
        return name
    return device.type if device.type in BACKENDS else "torch"

"""The devices of tests for a GPU: each also runs on a CPU, where kernels are interpreted."""

import os

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET", "1")  # `make gpu-test` says 0

DEVICES = [
    pytest.param("cpu", id="interpreted"),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
        ],
    ),
]

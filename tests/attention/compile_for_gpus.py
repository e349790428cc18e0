"""Compile the Triton kernels for a GPU that is not there: fails if one spills or does not fit.

    python compile_for_gpus.py 90 decode:int8:128 prefill:raw:64

Registers, stack and shared memory are as the GPU's own assembler gives them. What seals may have no
instruction that rounds otherwise than a CPU.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress.int4 import group_dims
from longctx.attention import cuda_backend as backend
from longctx.kernels import triton_attention as kernels
from longctx.kernels import triton_layers
from longctx.kernels.triton_seal import seal_blocks
from longctx.model import gpu_layers

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # of one block
GROUP, KV_HEADS = 4, 8
# As those of real shapes are
ALIGNED = {"page_stride", "query_row_stride", "query_head_stride", "row_stride", "width"}

ATTEND = dict(
    query="*bf16",
    query_row_stride="i32",
    query_head_stride="i32",
    pages="*i32",
    page_stride="i32",
    own="*bf16",
    tiles="*i32",
    entries="*i32",
    out="*fp32",
    lse="*fp32",
    out_rows="i32",
    scaling="fp32",
    softcap="fp32",
    window="i32",
)
SEAL = dict(
    raw="*bf16", raw_pages="*i64", raw_begin="i32", packed="*i32", page_stride="i32",
    packed_pages="*i64", packed_begin="i32",
)  # fmt: skip
UNPACK = dict(pages="*i32", page_stride="i32", entries="*i32", rows="*bf16", largest="fp32")
NORM = dict(
    rows="*bf16", added="*bf16", factors="*fp32", sums="*bf16", out="*bf16", width="i32",
    epsilon="fp32",
)  # fmt: skip
TURN = dict(
    rows="*bf16", row_stride="i32", cosines="*bf16", sines="*bf16", factors="*fp32",
    epsilon="fp32", pool="*bf16", slots="*i64", slot_begin="i32",
)  # fmt: skip
GATE = dict(both="*bf16", out="*bf16", width="i32")
COMBINE = dict(
    parts="*fp32", part_lse="*fp32", rows="*i32", out="*fp32", lse="*fp32", part_rows="i32",
    heads="i32",
)  # fmt: skip


def described(
    kernel: str, codec: str, dim: int, target: int
) -> tuple[Any, dict[str, str], dict[str, Any], int]:
    """Return a kernel, its arguments' types, its constants and its warps, as the backend would."""
    pad = max(16, triton.next_power_of_2(dim))
    if kernel in ("norm", "turn", "gate"):
        return _between_products(kernel, dim, pad)
    kind = backend.CODECS[codec].value
    value_group = group_dims(dim) if codec == "int4" else dim
    if kernel == "combine":
        return kernels.combine, COMBINE, dict(D=dim, D_PAD=pad, SPLITS=16), 4
    if kernel == "seal":
        types = SEAL | ({"packed": "*bf16"} if codec == "raw" else {})
        constants = dict(
            D=dim,
            D_PAD=pad,
            KV_HEADS=KV_HEADS,
            CODEC=kind,
            VALUE_GROUP=value_group,
            GROUPS_PAD=triton.next_power_of_2(dim // value_group),
            GROUP_PAD=triton.next_power_of_2(value_group),
            RAW_LISTED=True,
            PACKED_LISTED=True,
        )
        return seal_blocks, types, constants, backend.SEAL_WARPS
    if kernel == "unpack":
        constants = dict(D=dim, D_PAD=pad, KV_HEADS=KV_HEADS, CODEC=kind, VALUE_GROUP=value_group)
        return kernels.unpack, UNPACK, constants, 4
    # "question": few tiles of many rows, whose pages are split as those of decoding
    m = 16 if kernel == "decode" else backend.most_rows(dim, 2, target // 10)
    types = ATTEND | ({"pages": "*bf16"} if codec == "raw" else {})
    constants = dict(
        GROUP=GROUP,
        M=m,
        D=dim,
        D_PAD=pad,
        KV_HEADS=KV_HEADS,
        SPLITS=1 if kernel == "prefill" else 16,
        CODEC=kind,
        VALUE_GROUP=value_group,
        HAS_CAP=False,
        HAS_WINDOW=False,
        DOT=tl.bfloat16,
    )
    if kernel == "question-rounded":
        types, constants = types | {"out": "*bf16"}, constants | {"SPLITS": 1}
    return kernels.attend_tiles, types, constants, backend.warps(m, dim)


def _between_products(
    kernel: str, dim: int, pad: int
) -> tuple[Any, dict[str, str], dict[str, Any], int]:
    """The most that one of these kernels does; `dim` is a row's width, or a head's."""
    if kernel == "norm":
        constants = dict(WIDTH_PAD=pad, ADDS=True, TWICE=True, BITS=False)
        return triton_layers.rms_norm, NORM, constants, gpu_layers.norm_warps(pad)
    if kernel == "gate":
        constants = dict(BLOCK=gpu_layers.GATES_AT_ONCE, KIND=triton_layers.GELU.value, BITS=False)
        return triton_layers.gate_rows, GATE, constants, 4
    constants = dict(
        HEADS=32,
        KV_HEADS=KV_HEADS,
        D=dim,
        TURNED=dim // 2,
        PAIRS_PAD=triton.next_power_of_2(dim // 4),
        REST_PAD=triton.next_power_of_2(dim // 2),
        STYLE=triton_layers.HALVES.value,
        NORMS=True,
        TWICE=True,
        PLACED=True,
        LISTED=True,
        BITS=False,
    )
    return triton_layers.turn_heads, TURN, constants, 1


def main(target: int, names: list[str]) -> int:
    faults = 0
    for name in names:
        kernel, codec, dim = name.split(":")
        function, types, constants, warps = described(kernel, codec, int(dim), target)
        signature = types | dict.fromkeys(constants, "constexpr")
        aligned = {
            (index,): [["tt.divisibility", 16]]
            for index, (argument, kind) in enumerate(signature.items())
            if kind.startswith("*") or argument in ALIGNED
        }
        made = triton.compile(
            ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned),
            target=GPUTarget("cuda", target, 32),
            options={
                "num_warps": warps,
                "num_stages": backend.stages(backend.CODECS[codec]),
                "enable_fp_fusion": kernel != "seal",
            },
        )
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            said = subprocess.run(
                [TOOLS / "cuobjdump", "-res-usage", file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
        assert found, said
        registers, stack, local = map(int, found.groups())
        shared = made.metadata.shared
        good = stack == local == 0 and shared <= SHARED_BYTES[target]
        if kernel == "seal":  # to the same bytes as a CPU's
            inexact = re.findall(r"\b(fma\.\w+|div\.full|\w+\.ftz)\b", made.asm["ptx"])
            good = good and not inexact
        faults += not good
        print(
            f"sm_{target} {name}: {registers} registers, {stack + local} bytes spilled, {shared} "
            f"shared{'' if good else ' <-- too many'}"
        )
    return faults


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))

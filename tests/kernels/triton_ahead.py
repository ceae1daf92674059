"""Compile the Triton kernels for compute capability 9.0 on a machine that has no GPU; `test_triton.py` runs it.

The interpreter takes for granted what the compiler refuses: a loop that changes a variable's type, branches that
disagree. With "count" the machine code is read too: a line of JSON for every kernel.
"""

from __future__ import annotations

import json
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import torch

import normwright as nw
from normwright.kernels.triton import ahead

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NCHW, NHWC = torch.contiguous_format, torch.channels_last


def both_ways(row, shape, dtype, act=None, residual=False, mask=False, layout=NCHW, evaluate=True, **sizes):
    """The launches of forward and backward, in training and, if the norm has statistics to keep, evaluation."""
    spec = nw.CATALOG[row].make(**sizes)
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout, requires_grad=True)
    compute = F64 if dtype == F64 else F32
    affine = spec.layout(shape).affine_shape
    weight, bias = (torch.empty(affine, dtype=compute, device="meta", requires_grad=True) for _ in range(2))
    more = {"act": act, "residual": torch.empty_like(x) if residual else None}
    more |= {"mask": torch.empty(shape[0], dtype=torch.bool, device="meta")} if mask else {}
    more |= (
        {f"running_{name}": torch.empty(shape[1], device="meta") for name in ("mean", "var")} if spec.running else {}
    )

    def step():
        for batch in [True, False] if spec.running and evaluate else [True]:
            y = nw.normalize(x, spec, weight, bias if spec.center else None, use_batch_stats=batch, **more)
            y.backward(torch.empty_like(y))

    return ahead.launches(step)


def some():
    yield both_ways("BatchNorm", (64, 64, 56, 56), F32, "relu", True, True, NHWC)
    yield both_ways("LayerNorm", (64, 1000), BF16, "silu", True)
    yield both_ways("LayerNorm", (4, 40000), F32)


def all_of_them():
    yield from some()
    for layout in (NCHW, NHWC):
        yield both_ways("BatchNorm", (64, 64, 56, 56), F32, layout=layout)
        yield both_ways("BatchNorm", (4, 8, 6, 6), F32, "leaky_relu", True, True, layout)
        yield both_ways("BatchNorm", (4, 8, 6, 6), F64, "leaky_relu", True, layout=layout)
        yield both_ways("GroupNorm", (4, 8, 6, 6), F16, "gelu", False, True, layout, g=2)
        yield both_ways("GroupNorm", (3, 6, 5, 5), F64, "relu", True, layout=layout, g=2)
        yield both_ways("GroupNorm", (3, 64, 99, 99), BF16, layout=layout, g=2)
        yield both_ways("ChannelNorm", (4, 8, 16, 16), BF16, "tanh", True, layout=layout)
        yield both_ways("FilterResponseNorm", (2, 3, 200, 200), F32, "sigmoid", True, layout=layout)
    yield both_ways("BatchNorm", (3, 2), F16, "relu", True)
    yield both_ways("RMSNorm", (64, 1000), F64, "relu", True, True)
    yield both_ways("LayerNorm", (4, 40000), F16, "relu", True, True)


def counted():
    for dtype in (F32, BF16):
        for layout in (NCHW, NHWC):
            for shape in [(128, 64, 56, 56), (128, 512, 14, 14), (128, 2048, 7, 7)]:
                yield both_ways("BatchNorm", shape, dtype, "relu", layout=layout, evaluate=False)
            yield both_ways("BatchNorm", (128, 256, 28, 28), dtype, "relu", True, layout=layout, evaluate=False)
        for shape in [(8192, 1024), (8192, 4096), (4096, 8192)]:
            yield both_ways("LayerNorm", shape, dtype)
            yield both_ways("RMSNorm", shape, dtype)


if __name__ == "__main__":
    if "count" in sys.argv:
        for launches in counted():
            for launch in launches:
                code, x = launch.code(), launch.arguments[0]
                line = {
                    "kernel": launch.kernel, "shape": list(x.shape), "nhwc": x.dim() == 4 and x.stride(1) == 1,
                    "bytes": x.itemsize, "registers": code.registers, "spilled": code.spilled,
                    "widest": max((loop.widest for loop in code.loops), default=code.widest),
                    "each": launch.per_value(code), "issue": launch.per_value(code) / launch.bytes_a_value,
                }  # fmt: skip
                print(json.dumps(line))
    else:
        found = {
            launch.key: launch for launches in (all_of_them() if "all" in sys.argv else some()) for launch in launches
        }
        for launch in found.values():
            launch.compile()
        print(len(found), "kernels")

"""Compile the Triton kernels for a GPU (compute capability 9.0) on a machine that has none; `test_triton.py` runs it.

The interpreter takes for granted what the compiler refuses: a loop that changes a variable's type, branches that
disagree. Calls go as far as the launch of a kernel, whose arguments are compiled for as Triton would, and no further.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import normwright as nw
from normwright.kernels import triton as backend
from normwright.kernels.triton import kernels

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TYPES = {F32: "fp32", F64: "fp64", BF16: "bf16", F16: "fp16", torch.uint8: "u8"}
done: set[tuple] = set()


def compile_for(name, arguments, keywords, warps):
    fn = getattr(kernels, name)
    given = dict(zip((p.name for p in fn.params), arguments, strict=False)) | keywords
    signature, constants = {}, {}
    for p in fn.params:
        value = given[p.name]
        # Triton makes absent tensors and sizes of 1 constants too
        if p.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[p.name], constants[p.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[p.name] = "*" + TYPES[value.dtype]
        else:
            signature[p.name] = p.annotation_type or ("fp32" if isinstance(value, float) else "i32")
    key = (name, warps, *signature.items(), *((k, str(v)) for k, v in constants.items()))
    if key not in done:
        done.add(key)
        triton.compile(ASTSource(fn, signature, constants), GPUTarget("cuda", 90, 32), {"num_warps": warps})


def launch(name):
    class Launch:
        def __getitem__(self, grid):
            return lambda *arguments, num_warps, **keywords: compile_for(name, arguments, keywords, num_warps)

    return Launch()


def both_ways(row, shape, dtype, act, residual, mask, layout=torch.contiguous_format, **sizes):
    spec = nw.CATALOG[row].make(**sizes)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout).requires_grad_()
    compute = F64 if dtype == F64 else F32
    weight, bias = (torch.ones(spec.layout(shape).affine_shape, dtype=compute, requires_grad=True) for _ in range(2))
    more = {"act": act, "residual": torch.randn_like(x) if residual else None}
    more |= {"mask": torch.rand(shape[0]) > 0.5} if mask else {}
    more |= {"running_mean": torch.zeros(shape[1]), "running_var": torch.ones(shape[1])} if spec.running else {}
    for batch in [True, False] if spec.running else [True]:
        nw.normalize(x, spec, weight, bias if spec.center else None, use_batch_stats=batch, **more).sum().backward()


def main(everything):
    backend.INTERPRETING = True
    backend._kernels = lambda: SimpleNamespace(**{name: launch(name) for name in kernels.__all__})
    nw.use("triton")
    both_ways("BatchNorm", (64, 64, 56, 56), F32, "relu", True, True, torch.channels_last)
    both_ways("LayerNorm", (64, 1000), BF16, "silu", True, False)
    both_ways("LayerNorm", (4, 40000), F32, None, False, False)
    if not everything:
        return
    for layout in (torch.contiguous_format, torch.channels_last):
        both_ways("BatchNorm", (64, 64, 56, 56), F32, None, False, False, layout)
        both_ways("BatchNorm", (4, 8, 6, 6), F32, "leaky_relu", True, True, layout)
        both_ways("BatchNorm", (4, 8, 6, 6), F64, "leaky_relu", True, False, layout)
        both_ways("GroupNorm", (4, 8, 6, 6), F16, "gelu", False, True, layout, g=2)
        both_ways("GroupNorm", (3, 6, 5, 5), F64, "gelu", True, False, layout, g=2)
        both_ways("ChannelNorm", (4, 8, 16, 16), BF16, "tanh", True, False, layout)
        both_ways("FilterResponseNorm", (2, 3, 200, 200), F32, "sigmoid", True, False, layout)
    both_ways("BatchNorm", (3, 2), F16, "relu", True, False)
    both_ways("RMSNorm", (64, 1000), F64, "relu", True, True)
    both_ways("LayerNorm", (4, 40000), F16, "relu", True, True)


if __name__ == "__main__":
    main("all" in sys.argv)
    print(len(done), "kernels")

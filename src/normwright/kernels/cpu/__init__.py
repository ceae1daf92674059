"""The CPU backend: Numba kernels on PyTorch's own threads.

`recipe` decides, once per spec, shape, strides and type, which family of kernels runs and how the work is cut;
`normalize` joins them to autograd. Everything per call is kept short: small tensors are all overhead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...spec import NormSpec
from .. import compiled, native
from ..call import Call, check_sizes
from ..common import (
    BY_SIGN,
    computed,
    differentiable,
    entries,
    evaluation_spec,
    laid_out,
    no_running,
    not_plain,
    put_back,
    valid_part,
)
from ..plan import NoPlan, Plan, plan
from . import build, context

__all__ = ["STATISTICS", "WORTH", "backward", "expand_mask", "forward", "normalize", "prepare", "saved"]

STATISTICS = 2  # rows: means and variances

_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

# below this many elements one thread is taken to be faster than waking the pool: an estimate from (256, 120), whose
# kernels take 8 and 13 µs on one thread, and not a measured crossing
SERIAL = 100_000
# elements from which these kernels, and their call from Python, are faster than torch's operator for the pattern,
# forward and backward, float32, one thread of a Zen 5; see `few` for the rest
WORTH = {
    "batch_norm": 24576,  # NCHW crosses at 18,000, channels_last at 25,000
    "batch_norm_1d": 65536,  # (N, C)
    # batch norm by running statistics, timed behind a convolution, which takes Python's code from the caches: with ReLU
    # 0.85 at 1,000,000 elements, 1.1 at 2,000,000 and 1.3 at 8,000,000
    "evaluation": 1 << 22,
    "instance_norm": 0,
    "group_norm": 114688,
    "layer_norm": 73728,
    "rms_norm": 0,
    None: 0,  # the formula in composed operators
}
# the same for a norm alone in contiguous float32 with gradients, where torch's kernels are vectorized well: layer norm
# is level at every size (0.85 to 1.06 from 512×256 to 2048×4096), group norm 0.64 at (16,512,7,7), 0.9 at
# (32,256,14,14) and 1.2 from (32,128,28,28) on
PLAIN = {"layer_norm": 1 << 62, "group_norm": 2_000_000}
# bytes of a result from which segments and columns write it past the cache, which could not hold it for whoever reads
# it next: batch norm of 26 MB took 4.3 ms against 5.5, forward and backward on one thread of a Zen 5 with 32 MB of
# third-level cache; rows gained nothing
STREAM = 1 << 24
# a stretch shorter than this is cheaper side by side with others (columns) than alone (segments): (256,16,8,8) took
# 0.11 ms against 0.16, forward and backward on one thread of a Zen 5
SHORT = 128
# columns of a block: eight float32 arrays of it stay in a 32 KB first-level cache beside a tile of x
COLUMNS = 512
# a row no longer than this is one block all the same, because whole rows are read in one stream: (32,1024,14,14)
# channels_last took 6.5 ms against 9.1, on the same machine
ROW = 2048


@dataclass(frozen=True)
class Recipe:
    """How one call runs: the family of kernels, the plan, and the cut of the work."""

    family: str
    plan: Plan
    R: int
    chunks: int
    columns: int
    tasks: int
    workers: int
    parallel: bool
    dtype: str
    compute: torch.dtype
    statistics: int
    running: int  # running statistics, if there are any
    merged: bool  # running statistics average over several of the batch's
    permuted: bool  # kept axes lie in memory in another order than in the pattern
    scattered: bool  # statistic k of the batch is not running statistic k
    head: tuple[int, ...]  # the context's first slots, up to the phase
    width: int  # bytes of the type that computes
    stream: bool  # the result is written past the cache
    by_output: bool  # sigmoid's and tanh's slopes are found from y
    scratch: tuple[int, int]  # bytes of scratch memory, forward and backward
    share: tuple[int, int]  # what the pool shares out, forward and backward
    phases: tuple[int, ...]  # of a call with the batch's statistics
    partial: int  # parts in which the kernels leave the parameter gradients; 1 where they leave the sums themselves


@lru_cache(maxsize=4096)
def recipe(
    spec: NormSpec, use_batch: bool, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, threads: int
) -> Recipe | str:
    """The recipe, or a sentence that says why there is none."""
    try:
        p = plan(spec if use_batch else evaluation_spec(spec), shape, strides)
    except NoPlan as reason:
        return str(reason)
    numel = math.prod(shape)
    parallel = numel >= SERIAL and threads > 1
    O, A, K, B = p.O, p.A, p.K, p.B
    R = 1
    if p.by_a:
        family = "columns"
    elif A == 1:
        family = "rows" if p.S == 1 and p.P > 1 else "segments"
    else:
        family = "columns" if B < SHORT or p.S < SHORT else "segments"
    if family == "rows" and not use_batch:
        return "running statistics with a parameter for every element of a row have no kernel"
    if family == "segments" and parallel and O * K == 1 and p.P == 1:
        # one statistic for all threads: cut it into columns, whose rows can be shared out
        width = math.gcd(A * B, 256)
        if width >= SHORT:
            family, p = "columns", replace(p, A=A * B // width, B=width, S=width)
            O, A, K, B = p.O, p.A, p.K, p.B
    outer = O > 1
    if family == "segments" and not use_batch:
        # nothing is summed: go through memory in its order; (32,64,56,56) at evaluation took 1.2 ms against 2.0
        p = replace(p, O=O * A, A=1)
        O, A = p.O, p.A
    chunks = columns = 1
    tasks, workers = O * K, 1
    if family == "columns":
        width = K * B
        if B > COLUMNS:
            return f"{B} contiguous values per statistic with a parameter each, over {A} rows, have no kernel"
        if width <= COLUMNS // 2 and not p.by_a:
            R = max((r for r in range(1, COLUMNS // width + 1) if A % r == 0), default=1)
            A //= R
        columns = R * width if R * width <= ROW and not p.by_a else COLUMNS // B * B
        blocks = -(-R * width // columns)
        if parallel and not p.by_a and O * blocks < threads:
            chunks = max(1, min(A // 8, -(-threads // (O * blocks))))
        tasks = O * blocks * chunks
        workers = min(tasks, threads) if parallel else 1
    elif family == "rows":
        workers = min(tasks, threads) if parallel else 1
    layout = p.layout
    kept = [i for i in entries(p) if i in layout.kept and layout.split[i] != 1]
    merged = bool(spec.running) and any(layout.split[i] > 1 for i in layout.merged)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    width = compute.itemsize
    of_columns = 0
    if family == "columns":
        of_columns = O * chunks * 3 * R * K * B * 8 + workers * columns * (3 * 8 + 8 * width)
    return Recipe(
        family=family,
        plan=p,
        R=R,
        chunks=chunks,
        columns=columns,
        tasks=tasks,
        workers=workers,
        parallel=parallel,
        dtype=_NAMES[dtype],
        compute=compute,
        statistics=O * K if use_batch else K,
        running=math.prod(layout.running_shape),
        merged=merged,
        permuted=kept != sorted(kept),
        scattered=kept != sorted(kept) or (outer and not merged),
        head=(O, A, K, B, p.G, p.P, p.S, p.by_a, R, tasks, workers, chunks, columns),
        width=width,
        stream=numel * dtype.itemsize >= STREAM,
        # exponentials once, not three times: batch norm and sigmoid of (32,256,56,56) took 10 ms backward against 20 in
        # bfloat16, on one thread of a Zen 5; in float32, where y is read from memory twice besides, 22 against 18
        by_output=family != "columns" or dtype.itemsize == 2 or numel * dtype.itemsize < STREAM,
        scratch=(of_columns, workers * 2 * p.parameters * (8 + width) if family == "rows" else of_columns),
        share=(workers if family == "columns" else tasks, tasks if family == "segments" else workers),
        phases=(0,) if chunks == 1 else (1, 2),
        partial=workers if family == "rows" else tasks if p.by_a else O * (K // p.G),
    )


def few(x: Tensor, operator: str | None, fused: bool) -> bool:
    """Whether torch's operator is faster on so few elements.

    An activation or residual that joins the norm halves the crossing, and a forward pass alone has a quarter of it:
    batch norm 18,000, with ReLU 10,000, without gradients 3,000; layer norm 70,000, 33,000, 18,000. At evaluation
    there are no sums to be saved, with gradients or without. Layer and group norm alone in float32 have `PLAIN`.
    """
    if operator == "batch_norm" and x.dim() == 2:
        operator = "batch_norm_1d"
    least = WORTH[operator]
    if operator in PLAIN and not fused and x.dtype == torch.float32 and torch.is_grad_enabled() and x.is_contiguous():
        return x.numel() < PLAIN[operator]
    # on the constant's side, because while torch traces, numel is no plain number
    return x.numel() < (least if operator == "evaluation" or torch.is_grad_enabled() else least >> 2) >> fused


def prepare(call: Call, demanded: bool) -> Recipe | ModuleType | str:
    """The recipe for this call, or a sentence that says why these kernels do not run it.

    While torch.compile traces, shapes may be symbols: the recipe is then left to the operator of `compiled`.
    """
    x = call.x
    if not x.is_cpu:
        return f"the input is on {x.device}"
    if x.dtype not in _NAMES:
        return f"there is no kernel for {x.dtype}"
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return "an exported program is kept to torch's own operators"
        return build.UNAVAILABLE or compiled
    if (reason := not_plain(call) or build.UNAVAILABLE) is not None:
        return reason
    fused = call.act is not None or call.residual is not None
    operator = native.torch_operator(call.spec) if call.mask is None else None
    if operator == "batch_norm" and not call.use_batch_stats:
        operator = "evaluation"
    if not demanded and few(x, operator, fused):
        if x.numel() < WORTH[operator]:
            return "torch's own operators are faster on so few elements"
        return "torch's own operator is as fast for this norm alone in contiguous float32"
    found = recipe(call.spec, call.use_batch_stats, x.shape, x.stride(), x.dtype, torch.get_num_threads())
    return found if isinstance(found, str) else no_running(call, found) or found


def normalize(call: Call, found: Recipe | ModuleType) -> Tensor:
    """`act(norm(x) · weight + bias + residual)` by compiled kernels; arguments as in `functional.normalize`."""
    if not isinstance(found, Recipe):
        return compiled.normalize(call, "cpu")
    x, weight, bias, residual = call.x, call.weight, call.bias, call.residual
    check_sizes(call, found.plan.parameters, found.running)
    if found.plan.copy:
        x = x.contiguous()
    if weight is not None and (weight.dtype != found.compute or not weight.is_contiguous()):
        weight = weight.to(found.compute).contiguous()
    if bias is not None and (bias.dtype != found.compute or not bias.is_contiguous()):
        bias = bias.to(found.compute).contiguous()
    if residual is not None:
        residual = laid_out(residual, x)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return _apply(x, weight, bias, residual, call, found)
    return forward(x, weight, bias, residual, call, found, keep=call.use_batch_stats)[0]


@cache
def _constant(value: float, size: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((size,), value, dtype=dtype)


def _row_parameters(weight: Tensor | None, bias: Tensor | None, found: Recipe) -> tuple[Tensor | None, Tensor | None]:
    """The row kernels read a weight and a bias always: ones and zeros where there are none."""
    size = found.plan.parameters
    weight = _constant(1.0, size, found.compute) if weight is None else weight
    return weight, _constant(0.0, size, found.compute) if bias is None else bias


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call, found: Recipe,
    keep: bool = True,
) -> tuple[Tensor, Any, Tensor | None]:  # fmt: skip
    """Output, statistics (means, then variances, in double; None unless `keep`), and the mask as the kernels read it.

    Running statistics that are used, not moved, are read where they lie, and kept for a backward pass only.
    """
    _, spec, _, _, running_mean, running_var, use_batch, new_weight, eps, act, _, mask = call
    y = torch.empty_like(x)
    if found.family == "rows":
        weight, bias = _row_parameters(weight, bias, found)
    flags = None if mask is None else expand_mask(found, mask)
    n, center = found.statistics, spec.center
    statistics = None
    if keep:
        statistics = (
            torch.empty(2 * n, dtype=torch.float64) if use_batch else native.batch_statistics(call, found.plan.layout)
        )
    moves = use_batch and running_var is not None and not found.merged
    mean = var = None
    at_mean = at_var = 0
    if moves or not use_batch:
        mean, var = computed(running_mean, found.compute), computed(running_var, found.compute)
        if mean is None and (center or not use_batch):  # the kernel moves both, or reads both
            mean = torch.zeros(found.running, dtype=found.compute)
        at_mean, at_var = 0 if mean is None else mean.data_ptr(), var.data_ptr()  # type: ignore[union-attr]
    scratch = torch.empty(found.scratch[0], dtype=torch.uint8) if found.scratch[0] else None
    run = build.kernel(
        found.family,
        "forward",
        found.dtype,
        act or "none",
        "none" if residual is None else "residual",
        flags is not None,
    )
    where = 0 if statistics is None else statistics.data_ptr()
    for phase in found.phases if use_batch else found.phases[-1:]:
        run(
            found.share[0],
            context.pack(
                *found.head, phase, use_batch, center, moves, 0, found.stream,
                x.data_ptr(), y.data_ptr(), 0 if weight is None else weight.data_ptr(),
                0 if bias is None else bias.data_ptr(), 0 if residual is None else residual.data_ptr(),
                where, where + 8 * n, at_mean, at_var, 0, 0, 0, 0, 0 if scratch is None else scratch.data_ptr(),
                0 if flags is None else flags.data_ptr(), eps, new_weight,
            ),
            found.parallel,
        )  # fmt: skip
    if moves:
        put_back(running_mean, mean)
        put_back(running_var, var)
    elif use_batch and running_var is not None:
        layout = found.plan.layout
        mean, var = statistics.view(2, *layout.stat_shape).unbind()  # type: ignore[union-attr]
        with torch.no_grad():
            native.update_running(
                layout, running_mean, running_var, mean if center else None, var, layout.count, new_weight
            )
    return y, statistics, flags


def expand_mask(found: Recipe, mask: Tensor) -> Tensor:
    """The mask in the order of memory: for columns one entry an element, otherwise one a position."""
    layout = found.plan.layout
    full = mask.reshape(layout.mask_view(tuple(mask.shape))).expand(layout.split)
    if found.family != "columns":
        for i, size in enumerate(layout.affine_view):
            if size > 1:
                full = full.narrow(i, 0, 1)
    return full.permute(entries(found.plan)).contiguous()


def saved(act: str | None, has_residual: bool) -> str:
    """What backward needs besides x: the sign of the output says all that relu's slope needs."""
    if not has_residual:
        return "output" if act in _BY_OUTPUT else "none"
    return "none" if act is None else "output" if act in BY_SIGN else "residual"


class _Normalize(torch.autograd.Function):
    """Autograd's view of the kernels: x, mean and variance are saved, the activation is recomputed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, residual: Any, call: Call, found: Recipe) -> Tensor:
        y, statistics, flags = forward(x, weight, bias, residual, call, found)
        need = saved(call.act, residual is not None)
        extra = residual if need == "residual" else None
        if need == "output" and (residual is not None or found.by_output):
            extra = y
        ctx.save_for_backward(x, weight, bias, extra, statistics, flags)
        # not the call itself: it would keep alive what autograd frees
        ctx.rest = (call.spec, call.use_batch_stats, call.eps, call.act, call.mask, call.running_mean, call.running_var)
        ctx.found, ctx.has_residual = found, residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:  # type: ignore[override]
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            layout = ctx.found.plan.layout
            found = differentiable(ctx.rest, layout, ctx.needs_input_grad, ctx.has_residual, dy, *saved)
        else:
            found = backward(ctx.rest, ctx.found, ctx.needs_input_grad, ctx.has_residual, dy, *saved)
        return (*found, None, None)


# what Function.apply does besides concerns functorch, which prepare has ruled out, and costs 2 µs
_apply: Any = super(torch.autograd.Function, _Normalize).apply  # type: ignore[misc]
_BY_OUTPUT = ("sigmoid", "tanh")


def backward(
    rest: tuple, found: Recipe, need: tuple[bool, ...], has_residual: bool, dy: Tensor, x: Tensor,
    weight: Tensor | None, bias: Tensor | None, extra: Tensor | None, statistics: Tensor, flags: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, weight, bias and residual by the kernels."""
    spec, use_batch, eps, act, mask, _, _ = rest
    n = found.statistics
    if dy.stride() != x.stride():
        dy = laid_out(dy, x)
    dx = torch.empty_like(x)
    kind, dextra = "none", None
    if extra is not None:
        if has_residual:
            kind, dextra = "output" if act in BY_SIGN else "residual", torch.empty_like(x)
        else:
            kind = "output-only"
    want = (need[1] and weight is not None) or (need[2] and bias is not None)
    w, b = _row_parameters(weight, bias, found) if found.family == "rows" else (weight, bias)
    sums = dweight = dbias = None
    at_weight = at_bias = 0
    if want:
        like = bias if weight is None else weight
        if found.partial == 1:
            dweight, dbias = torch.empty_like(like), torch.empty_like(like)  # type: ignore[arg-type]
            at_weight, at_bias = dweight.data_ptr(), dbias.data_ptr()
        else:
            sums = torch.empty((2, found.partial, *like.shape), dtype=found.compute)  # type: ignore[union-attr]
            at_weight = sums.data_ptr()
            at_bias = at_weight + sums.numel() // 2 * found.width
    size = found.scratch[1] if want or found.family == "columns" else 0
    scratch = torch.empty(size, dtype=torch.uint8) if size else None
    run = build.kernel(found.family, "backward", found.dtype, act or "none", kind, flags is not None)
    where = statistics.data_ptr()
    for phase in found.phases:
        run(
            found.share[1],
            context.pack(
                *found.head, phase, use_batch, spec.center, 0, want, found.stream,
                x.data_ptr(), dx.data_ptr(), 0 if w is None else w.data_ptr(), 0 if b is None else b.data_ptr(),
                0 if extra is None else extra.data_ptr(), where, where + 8 * n, 0, 0, dy.data_ptr(), at_weight, at_bias,
                0 if dextra is None else dextra.data_ptr(), 0 if scratch is None else scratch.data_ptr(),
                0 if flags is None else flags.data_ptr(), eps, 0.0,
            ),
            found.parallel,
        )  # fmt: skip
    if sums is not None:
        dweight, dbias = sums.sum(1).unbind()
    dresidual = None
    if has_residual and need[3]:
        dresidual = dextra
        if dextra is None:
            dresidual = dy if mask is None else valid_part(dy, found.plan.layout, mask)
    return dx if need[0] else None, dweight if need[1] else None, dbias if need[2] else None, dresidual

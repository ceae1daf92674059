"""The GPU backend: Triton kernels over the nest, for every pattern that has a plan.

`cut` decides, once per spec, shape, strides, type and device, how the work falls into programs; `normalize` joins the
kernels to autograd. With `TRITON_INTERPRET=1` the same kernels run on CPU tensors, one program after another: slow, and
exact enough to test every one of them without a GPU.

No GPU has timed these kernels yet. Until one has, they run where they are demanded, by `nw.use("triton")`; otherwise
CUDA tensors take torch's own operators, and `explain` says so.

Nothing here waits for the device or copies from it, every tensor is made where x is, and kernels are launched on x's
device and its current stream. So CUDA graphs can capture forward and backward, after one call of each with the same
shapes and types: it compiles and loads the kernels, which a capture may not. A graph repeats the `eps` and `new_weight`
that it was captured with; so `momentum=None`, whose weight is a count read by the host, has no place in one.
"""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
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

__all__ = [
    "CONFIG",
    "INTERPRETING",
    "STATISTICS",
    "Config",
    "Cut",
    "backward",
    "cut",
    "expand_mask",
    "forward",
    "normalize",
    "prepare",
    "saved",
]

STATISTICS = 3  # rows: means, variances and counts
# whether Triton interprets its kernels on the CPU; it decides for good when it is imported
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
UNAVAILABLE = None if find_spec("triton") else "triton is not installed; it comes with the CUDA builds of torch"


@dataclass(frozen=True)
class Config:
    """How work is cut for a GPU. Estimates from the sizes of registers and caches: none was timed.

    Arguments:
        tile: values of a tile that is one of several; 16 KB in float32.
        row: values of a tile that holds whole rows; 64 KB in float32, spread over 32 warps' registers.
        each: values of a thread. ptxas for compute capability 9.0 gives tiles of 4096 that are one of several 56 to 98
            registers a thread and spills none; at 32 values it gives 164 to 254. Whole rows of 8192 forward and of 4096
            backward spill none either; rows of 16384 spill 160 and 736 bytes a thread (at 32 values 224 and 2384).
        lines: neighbouring statistics of a tile where they, not the reduced values, are contiguous: 128 bytes.
        waves: programs for every processor that a launch should have, so that none idles at its end.
        splits: most shares of one statistic; whoever merges them reads that many parts.
    """

    tile: int = 4096
    row: int = 16384
    each: int = 8
    lines: int = 32
    waves: int = 4
    splits: int = 64


CONFIG = Config()
_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Cut:
    """How one call runs: the plan, tiles of BK kept by BR reduced values, and shares of each statistic."""

    plan: Plan
    R: int
    Q: int  # statistics
    stored: int  # statistics that the kernels are given or leave
    by_r: bool  # a parameter for every element of a row
    one: bool  # a tile holds whole statistics
    BK: int
    BR: int
    splits: int
    chunk: int
    across: bool  # a tile is as wide as it is across neighbouring statistics: so lie their signs
    sub: tuple[int, int, int, int, int, int]  # backward sums by parameter: K, B, R, BK, BR, chunk
    sub_splits: int
    rows: tuple[int, int, int, int]  # backward of rows: BK, BR, columns, rows of a program
    warps: int
    sub_warps: int
    row_warps: int
    compute: torch.dtype
    running: int
    merged: bool
    permuted: bool  # kept axes lie in memory in another order than in the pattern
    scattered: bool


@cache
def _kernels() -> Any:
    """The kernels' module, imported at first use, as Triton is."""
    if INTERPRETING:
        # Triton 3.6 turns its one-element arrays into loop bounds by int(), which NumPy 2.4 refuses
        from triton.runtime import interpreter

        def patched(tensor: Any, scope: Any, patch: Any = interpreter._patch_lang_tensor) -> None:
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        interpreter._patch_lang_tensor = patched
    from . import kernels

    return kernels


def _parts(n: int, size: int) -> int:
    return (n + size - 1) // size


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _warps(BK: int, BR: int, config: Config) -> int:
    return min(32, max(4, BK * BR // (32 * config.each)))


def _across(p: Plan, K: int, B: int, config: Config) -> bool:
    return config.lines > B and K > 1 and p.A > 1


@lru_cache(maxsize=4096)
def cut(
    spec: NormSpec, use_batch: bool, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype,
    processors: int, config: Config,
) -> Cut | str:  # fmt: skip
    """The cut, or a sentence that says why there is none."""
    try:
        p = plan(spec if use_batch else evaluation_spec(spec), shape, strides)
    except NoPlan as reason:
        return str(reason)
    by_r = p.by_a or (p.A == 1 and p.S == 1 and p.P > 1)
    if by_r and not use_batch:
        return "running statistics with a parameter for every element of a row have no kernel"
    if p.by_a and p.B > 1:
        return "contiguous values per statistic with a parameter for every outer place have no kernel"
    R, Q = p.A * p.B, p.O * p.K
    if max(R, Q) >= 1 << 31:  # offsets are 64-bit, and what counts these is not
        return f"{Q} statistics of {R} values: 2³¹ of either have no kernel"
    if by_r and p.G >= 1 << 16:
        return f"{p.G} groups with a parameter for every element of a row are more than a launch has places for"
    target = config.waves * processors

    def tiles(K: int, B: int, R: int) -> tuple[int, int, int, int, bool]:
        """BK, BR, shares, values of a share, and whether a tile holds whole statistics."""
        BK = min(_power(K), config.lines) if _across(p, K, B, config) else 1
        one = BK * _power(R) <= config.row
        BR = _power(R) if one else max(8, config.tile // BK)
        if one and BK == 1:
            BK = max(1, min(_power(K), config.tile // 4 // BR))
        programs = p.O * _parts(K, BK)
        shares = 1 if one else max(1, min(_parts(R, BR), target // programs, config.splits))
        chunk = _parts(_parts(R, BR), shares) * BR
        return BK, BR, _parts(R, chunk), chunk, one

    BK, BR, splits, chunk, one = tiles(p.K, p.B, R)
    P = 1 if by_r else p.P
    sub_K, sub_B = p.K * P, p.S if P > 1 else p.B
    sub_BK, sub_BR, sub_splits, sub_chunk, _ = tiles(sub_K, sub_B, p.A * sub_B)
    row_BR = _power(R) if _power(R) <= config.row else config.tile
    row_BK = max(1, min(_power(Q), (config.lines if p.by_a else 1) * max(1, config.tile // 4 // row_BR)))
    columns = _parts(R, row_BR)
    per_group = Q // p.G if by_r else Q
    shares = max(1, min(_parts(per_group, row_BK), target // columns))
    layout = p.layout
    kept = [i for i in entries(p) if i in layout.kept and layout.split[i] != 1]
    merged = bool(spec.running) and any(layout.split[i] > 1 for i in layout.merged)
    return Cut(
        plan=p,
        R=R,
        Q=Q,
        stored=Q if use_batch else p.K,
        by_r=by_r,
        one=one,
        BK=BK,
        BR=BR,
        splits=splits,
        chunk=chunk,
        across=_across(p, p.K, p.B, config),
        sub=(sub_K, sub_B, p.A * sub_B, sub_BK, sub_BR, sub_chunk),
        sub_splits=sub_splits,
        rows=(row_BK, row_BR, columns, _parts(_parts(per_group, row_BK), shares) * row_BK),
        warps=_warps(BK, BR, config),
        sub_warps=_warps(sub_BK, sub_BR, config),
        row_warps=_warps(row_BK, row_BR, config),
        compute=torch.float64 if dtype == torch.float64 else torch.float32,
        running=math.prod(layout.running_shape),
        merged=merged,
        permuted=kept != sorted(kept),
        scattered=kept != sorted(kept) or (p.O > 1 and not merged),
    )


def _runs_on(device: torch.device) -> bool:
    return device.type == "cuda" or (device.type == "cpu" and INTERPRETING)


def prepare(call: Call, demanded: bool) -> Cut | ModuleType | str:
    """The cut for this call, or a sentence that says why these kernels do not run it.

    While torch.compile traces, shapes may be symbols: the cut is then left to the operator of `compiled`.
    """
    x = call.x
    if UNAVAILABLE is not None:
        return UNAVAILABLE
    if not _runs_on(x.device):
        return f"the input is on {x.device}, and only TRITON_INTERPRET=1 runs these kernels without a GPU"
    if not demanded:
        return "no GPU has timed these kernels against torch's yet; nw.use('triton') demands them"
    if x.dtype not in _TYPES:
        return f"there is no kernel for {x.dtype}"
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return "an exported program is kept to torch's own operators"
        return compiled
    if (reason := not_plain(call)) is not None:
        return reason
    found = cut(call.spec, call.use_batch_stats, x.shape, x.stride(), x.dtype, _processors(x.device), CONFIG)
    return found if isinstance(found, str) else no_running(call, found) or found


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _on(x: Tensor) -> Any:
    """Triton launches on the current device, and on its current stream."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _compute_type(found: Cut) -> Any:
    import triton.language as tl

    return tl.float64 if found.compute == torch.float64 else tl.float32


def normalize(call: Call, found: Cut | ModuleType) -> Tensor:
    """`act(norm(x) · weight + bias + residual)` by Triton kernels; arguments as in `functional.normalize`."""
    if not isinstance(found, Cut):
        return compiled.normalize(call, "triton")
    x, residual = call.x, call.residual
    check_sizes(call, found.plan.parameters, found.running)
    if found.plan.copy:
        x = x.contiguous()
    weight, bias = (None if t is None else t.to(found.compute).contiguous() for t in (call.weight, call.bias))
    if residual is not None:
        residual = laid_out(residual, x)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual)):
        return _Normalize.apply(x, weight, bias, residual, call, found)  # type: ignore[return-value]
    return forward(x, weight, bias, residual, call, found, False)[0]


def saved(act: str | None, has_residual: bool) -> str:
    """What backward needs besides x: with a residual its slope is said by the sign of the output, or by itself."""
    return "none" if act is None or not has_residual else "bits" if act in BY_SIGN else "residual"


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call, found: Cut,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Output; means, biased variances and counts; the mask, a byte an element in the order of memory; and the signs.

    Of the signs there is a bit an element, eight values of a statistic in a byte; only if there is reason to keep them.
    """
    kernels = _kernels()
    spec, p = call.spec, found.plan
    y, bits = torch.empty_like(x), None
    if keep and saved(call.act, residual is not None) == "bits":
        bits = x.new_empty(found.Q * _parts(found.R, 8), dtype=torch.uint8)
    flags = None if call.mask is None else expand_mask(found, call.mask)
    moves = call.use_batch_stats and call.running_var is not None and not found.merged
    mean, var = (computed(t, found.compute) if moves else None for t in (call.running_mean, call.running_var))
    if call.use_batch_stats:
        statistics = x.new_empty((3, found.Q), dtype=torch.float64)
    else:
        statistics = native.batch_statistics(call, p.layout)
    nest = (p.A, p.K, p.B, found.R)
    # rows number their parameters by r
    parameters = (p.G, found.R, 1) if found.by_r else (p.G, p.P, p.S)
    common: dict[str, Any] = {
        "CENTER": spec.center, "MOVES": moves, "W": weight is not None, "BIAS": bias is not None,
        "RESIDUAL": residual is not None, "BITS": bits is not None, "ACROSS": found.across, "BY_R": found.by_r,
        "ACT": call.act or "none", "MASKED": flags is not None, "COMPUTE": _compute_type(found),
        "BK": found.BK, "BR": found.BR, "num_warps": found.warps,
    }  # fmt: skip
    programs = p.O * _parts(p.K, found.BK)
    with _on(x):
        if call.use_batch_stats and found.splits == 1:
            kernels.forward[(programs,)](
                x, flags, y, bits, weight, bias, residual, statistics, mean, var, *nest, *parameters, found.Q,
                call.eps, call.new_weight, ONE=found.one, **common,
            )  # fmt: skip
        else:
            parts = None
            if call.use_batch_stats:
                parts = x.new_empty((3, found.splits, found.Q), dtype=torch.float64)
                kernels.partials[(programs, found.splits)](
                    x, flags, parts, *nest, found.chunk, found.Q, CENTER=spec.center, MASKED=flags is not None,
                    COMPUTE=common["COMPUTE"], BK=found.BK, BR=found.BR, num_warps=found.warps,
                )  # fmt: skip
            kernels.apply[(programs, found.splits)](
                x, flags, y, bits, weight, bias, residual, parts, statistics, mean, var, *nest, *parameters,
                found.Q, found.stored, found.splits, found.chunk, call.eps, call.new_weight,
                GIVEN=not call.use_batch_stats, **common,
            )  # fmt: skip
    if moves:
        put_back(call.running_mean, mean)
        put_back(call.running_var, var)
    elif call.use_batch_stats and call.running_var is not None:
        layout = p.layout
        batch_mean, batch_var = statistics[:2].view(2, *layout.stat_shape).unbind()
        with torch.no_grad():
            native.update_running(
                layout, call.running_mean, call.running_var, batch_mean if spec.center else None, batch_var,
                layout.count, call.new_weight,
            )  # fmt: skip
    return y, statistics, flags, bits


def _signs(found: Cut, bits: Tensor) -> Tensor:
    """The bits as a tensor of the input's shape, for the formula."""
    p = found.plan
    each = bits.view(p.O, p.K, -1) if not found.across else bits.view(p.O, -1, p.K).transpose(1, 2)
    each = each.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1
    nest = each.flatten(2)[..., : found.R].unflatten(2, (p.A, p.B)).transpose(1, 2)
    order = entries(p)
    places = sorted(range(len(order)), key=order.__getitem__)
    return nest.reshape([p.layout.split[i] for i in order]).permute(places).reshape(p.layout.shape)


def expand_mask(found: Cut, mask: Tensor) -> Tensor:
    layout = found.plan.layout
    full = mask.reshape(layout.mask_view(tuple(mask.shape))).expand(layout.split)
    return full.permute(entries(found.plan)).contiguous().view(torch.uint8)


class _Normalize(torch.autograd.Function):
    """Autograd's view of the kernels: x, mean and variance are saved, the activation is recomputed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, residual: Any, call: Call, found: Cut) -> Tensor:
        y, statistics, flags, bits = forward(x, weight, bias, residual, call, found)
        extra = residual if saved(call.act, residual is not None) == "residual" else bits
        ctx.save_for_backward(x, weight, bias, extra, statistics, flags)
        # not the call itself: it would keep alive what autograd frees
        ctx.rest = (call.spec, call.use_batch_stats, call.eps, call.act, call.mask, call.running_mean, call.running_var)
        ctx.found, ctx.has_residual = found, residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:  # type: ignore[override]
        if torch.is_grad_enabled():
            layout, (x, weight, bias, extra, *_) = ctx.found.plan.layout, ctx.saved_tensors
            if saved(ctx.rest[3], ctx.has_residual) == "bits":
                extra = _signs(ctx.found, extra)
            found = differentiable(
                ctx.rest, layout, ctx.needs_input_grad, ctx.has_residual, dy, x, weight, bias, extra
            )  # fmt: skip
        else:
            found = backward(ctx.rest, ctx.found, ctx.needs_input_grad, ctx.has_residual, dy, *ctx.saved_tensors)
        return (*found, None, None)


def backward(
    rest: tuple, found: Cut, need: tuple[bool, ...], has_residual: bool, dy: Tensor, x: Tensor,
    weight: Tensor | None, bias: Tensor | None, extra: Tensor | None, statistics: Tensor, flags: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, weight, bias and residual by the kernels."""
    kernels = _kernels()
    spec, use_batch, eps, act, mask, _, _ = rest
    p = found.plan
    dy = laid_out(dy, x)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if extra is not None else None
    common: dict[str, Any] = {
        "W": weight is not None, "BIAS": bias is not None, "EXTRA": saved(act, has_residual),
        "ACROSS": found.across, "ACT": act or "none", "MASKED": flags is not None, "COMPUTE": _compute_type(found),
    }  # fmt: skip
    tensors = (x, flags, dy, extra, weight, bias, statistics)
    with _on(x):
        if found.by_r:
            BK, BR, columns, rows = found.rows
            per_group = found.Q // p.G
            shares = _parts(per_group, rows)
            sums = None
            if columns > 1:
                sums = x.new_empty((2, found.Q), dtype=found.compute)
                kernels.backward_row_sums[(p.O * _parts(p.K, found.BK),)](
                    *tensors, sums, p.A, p.K, p.B, found.R, p.G, found.Q, eps,
                    BK=found.BK, BR=found.BR, num_warps=found.warps, **common,
                )  # fmt: skip
            parameters = x.new_empty((2, shares, p.G * found.R), dtype=found.compute)
            kernels.backward_rows[(shares, columns, p.G)](
                *tensors, sums, dx, dresidual, parameters, p.A, p.K, p.B, found.R, p.G, found.Q, rows, eps,
                KNOWN=columns > 1, CENTER=spec.center, DRESIDUAL=dresidual is not None, BK=BK, BR=BR,
                num_warps=found.row_warps, **common,
            )  # fmt: skip
            dbias, dweight = parameters.sum(1).unbind()
        else:
            K, B, R, BK, BR, chunk = found.sub
            sums = x.new_empty((2, found.sub_splits, p.O * K), dtype=found.compute)
            kernels.backward_partials[(p.O * _parts(K, BK), found.sub_splits)](
                *tensors, sums, p.A, K, B, R, p.G, p.P, found.stored, chunk, p.O * K, eps,
                BK=BK, BR=BR, num_warps=found.sub_warps, **common,
            )  # fmt: skip
            kernels.backward_apply[(p.O * _parts(p.K, found.BK), found.splits)](
                *tensors, sums, dx, dresidual, p.A, p.K, p.B, found.R, p.G, p.P, p.S, found.Q, found.stored,
                found.sub_splits, found.chunk, eps,
                BATCH=use_batch, CENTER=spec.center, DRESIDUAL=dresidual is not None, BY_R=False,
                BK=found.BK, BR=found.BR, num_warps=found.warps, **common,
            )  # fmt: skip
            # (splits, O, K / G) times G·P: what shares a parameter
            dbias, dweight = sums.view(2, -1, p.G * p.P).sum(1).unbind()
    if has_residual and dresidual is None and need[3]:
        dresidual = dy if mask is None else valid_part(dy, p.layout, mask)
    return (
        dx if need[0] else None,
        None if weight is None or not need[1] else dweight.reshape(weight.shape),
        None if bias is None or not need[2] else dbias.reshape(bias.shape),
        dresidual if need[3] else None,
    )

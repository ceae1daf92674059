"""The GPU backend: Triton kernels over the nest, for every pattern that has a plan.

`cut` decides, once per spec, shape, strides, type and device, how the work falls into programs; `normalize` joins the
kernels to autograd. With `TRITON_INTERPRET=1` the same kernels run on CPU tensors, one program after another: slow, and
exact enough to test every one of them without a GPU.

They run where they are demanded, by `nw.use("triton")`, and where `nw.calibrate` has found them to be faster on the GPU
at hand; otherwise CUDA tensors take torch's own operators, and `explain` says so.

Nothing here waits for the device or copies from it, every tensor is made where x is, and kernels are launched on x's
device and its current stream. So CUDA graphs can capture forward and backward, after one call of each with the same
shapes and types: it compiles and loads the kernels, which a capture may not. A graph repeats the `eps` and `new_weight`
that it was captured with; so `momentum=None`, whose weight is a count read by the host, has no place in one.
"""

from __future__ import annotations

import math
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...spec import NormSpec
from .. import compiled, native, timed
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
    "Tiles",
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
    """How work is cut for a GPU.

    No GPU has timed these. What is said of instructions and registers is read from the machine code for compute
    capability 9.0 (`benchmarks/instructions.py`); the rest is reckoned from what such a GPU keeps in flight.

    Arguments:
        tile: values of a tile that is one of several: 128 threads of `each` values. Twice and four times as many are
            taken where they spare the shares, or where merging those takes long. From 1024 to 8192 values batch norm of
            128×64×56×56, channels first, bfloat16, takes 47 to 49 instructions a value in a training step.
        row: most values of a tile that holds whole statistics; 64 KB in float32. Backward holds two tensors: half.
        each: values of a thread. At 8, 16 and 32 batch norm of 128×512×14×14 in channels_last, bfloat16, takes 61, 54
            and 67 instructions a value and at most 64, 111 and 159 registers, of which 128 let 16 warps run.
        held: values of a thread where a tile holds whole statistics and nothing loops. At 8, 16 and 32 layer norm of
            rows of 4096 in bfloat16 takes 32, 22 and 17 instructions a value forward, and 32, 54 and 71 registers.
        lines: neighbouring statistics of a tile where they, not the reduced values, are contiguous: 128 bytes.
        resident: warps that a processor should have, so that 32 KB and more are in flight: half of those it takes.
        splits: most shares of one statistic; whoever merges them reads that many parts.
    """

    tile: int = 2048
    row: int = 16384
    each: int = 16
    held: int = 32
    lines: int = 32
    resident: int = 32
    splits: int = 128


CONFIG = Config()
LIMIT = (1 << 31) - (1 << 21)  # counts stay below 2³¹ where tiles and shares hang over
_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tiles:
    """A nest as tiles of BK kept by BR reduced values, and shares of `chunk` values of each statistic.

    Arguments:
        form: "flat" where B = 1, "rows" where A = 1, else "nest"; offsets are made so.
        one: a tile holds whole statistics.
        rows: neighbouring k that share a statistic, each with a parameter of its own.
    """

    O: int
    A: int
    K: int
    B: int
    form: str
    rows: int
    BK: int
    BR: int
    one: bool
    splits: int
    chunk: int
    warps: int

    @property
    def R(self) -> int:
        return self.A * self.B

    @property
    def Q(self) -> int:
        return self.O * self.K

    @property
    def grid(self) -> tuple[int, int]:
        return self.O * _parts(self.K, self.BK), self.splits

    @cached_property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """A, K, B, R, and the numbers that divide by B: magic and shift."""
        shift = max(self.B - 1, 0).bit_length()
        return self.A, self.K, self.B, self.R, -(-(1 << 31 + shift) // max(self.B, 1)), max(shift - 1, 0)

    @cached_property
    def constants(self) -> dict[str, Any]:
        """What the kernels are compiled for."""
        together = math.gcd(self.K, self.BK, 8) if self.form == "flat" else math.gcd(self.B, self.BR, 8)
        return {
            "FORM": self.form, "WIDE": self.Q * self.R >= 1 << 29, "V": together,
            "EVEN": self.K % self.BK == 0 and self.R % self.BR == 0,
            "BK": self.BK, "BR": self.BR, "num_warps": self.warps,
        }  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """How one call runs: the plan, and the tiles of its kernels."""

    plan: Plan
    statistics: Tiles
    values: Tiles  # of the result where the statistics are known: of the nest whose rows have one parameter each
    gradients: Tiles  # of the same, backward, which holds two tensors
    by_row: Tiles | None  # backward, where every element of a row has a parameter: splits are shares of the rows
    across: bool  # neighbouring k lie together in memory, a multiple of eight of them: their signs share bytes
    compute: torch.dtype
    running: int
    merged: bool
    permuted: bool  # kept axes lie in memory in another order than in the pattern
    scattered: bool

    @property
    def R(self) -> int:
        return self.plan.A * self.plan.B

    @property
    def Q(self) -> int:
        return self.plan.O * self.plan.K


@cache
def _kernels() -> Any:
    """The kernels' module, imported at first use, as Triton is."""
    if INTERPRETING:
        _mend_interpreter()
    from . import kernels

    return kernels


def _mend_interpreter() -> None:
    """Triton 3.6's interpreter on NumPy 2.4, and 1.6 times as fast (the tests' places in float32)."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor, patch_language = interpreter._patch_lang_tensor, interpreter._patch_lang

    def tensor(cls: Any, scope: Any) -> None:
        # its one-element arrays become loop bounds by int(), which NumPy 2.4 refuses
        patch_tensor(cls, scope)
        scope.set_attr(cls, "__index__", lambda self: self.handle.data.item())

    @cache
    def languages(module: str) -> tuple[Any, ...]:
        return tuple(value for value in vars(sys.modules[module]).values() if value in (tl, tl.core))

    def language(function: Any) -> Any:
        # every call of a function within a kernel would go through all members of the language again
        if any(tl.core.is_builtin(each.load) for each in languages(function.__module__)):
            return patch_language(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang_tensor, interpreter._patch_lang = tensor, language


def _parts(n: int, size: int) -> int:
    return (n + size - 1) // size


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _warps(tile: int, each: int) -> int:
    return min(32, max(1, tile // (32 * each)))


def _form(A: int, B: int) -> str:
    return "rows" if A == 1 else "flat" if B == 1 else "nest"


def _tiles(p: Plan, rows: int, streams: int, processors: int, config: Config) -> Tiles:
    """Tiles of the nest of the statistics, or of that whose rows have one parameter each, `rows` to a statistic.

    `streams` tensors are read at a time.
    """
    A, K, B = p.A, p.K * rows, p.B // rows
    across = config.lines > B and K > 1 and A > 1
    if K == 1 and p.P == 1:  # what is reduced lies together
        A, B = 1, A * B
    R = A * B
    BK = min(_power(K), config.lines) if across else 1
    if BK * _power(R) <= config.row // streams:
        BR = _power(R)
        if BK == 1:
            BK = max(1, min(_power(K), config.tile // 2 // BR))
        return Tiles(
            p.O, A, K, B, _form(A, B), rows, BK, BR, True, 1, BR, _warps(BK * BR, config.held // streams)
        )  # fmt: skip
    programs, wanted = p.O * _parts(K, BK), config.resident * processors

    def shares(tile: int) -> int:
        return max(1, wanted // (programs * _warps(tile, config.each)))

    # large tiles where they spare the shares altogether, or where merging those takes long
    sizes = [config.tile << i for i in range(3)]
    tile = next((size for size in sizes if shares(size) == 1), sizes[-1] if across else sizes[0])
    tile = next((size for size in sizes if size >= tile and shares(size) <= config.splits), sizes[-1])
    BR = max(8, tile // BK)
    splits = min(_parts(R, BR), shares(tile), config.splits)
    chunk = _parts(_parts(R, BR), splits) * BR
    return Tiles(
        p.O, A, K, B, _form(A, B), rows, BK, BR, False, _parts(R, chunk), chunk, _warps(BK * BR, config.each)
    )  # fmt: skip


def _by_row(p: Plan, processors: int, config: Config) -> Tiles:
    """Tiles of rows with a parameter for every element.

    Every program leaves a sum for every parameter; so there are half as many as elsewhere.
    """
    R, Q = p.A * p.B, p.O * p.K
    width = min(_power(p.K), config.lines) if p.by_a else 1
    BR = _power(R) if width * _power(R) <= config.row else max(8, 2 * config.tile // width)
    BK = max(width, min(_power(Q), config.tile // BR))
    warps = _warps(BK * BR, config.each)
    columns = _parts(R, BR)
    shares = max(1, min(_parts(Q // p.G, BK), max(config.resident * processors // (2 * warps), processors) // columns))
    chunk = _parts(_parts(Q // p.G, BK), shares) * BK
    shares = _parts(Q // p.G, chunk)
    return Tiles(p.O, p.A, p.K, p.B, _form(p.A, p.B), 1, BK, BR, columns == 1, shares, chunk, warps)


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
    if max(R, Q * (1 if by_r else p.P)) >= LIMIT:  # offsets are 64-bit, and what counts these is not
        return f"{Q} statistics of {R} values: 2³¹ of either, less a tile, have no kernel"
    if by_r and p.G >= 1 << 16:
        return f"{p.G} groups with a parameter for every element of a row are more than a launch has places for"
    layout = p.layout
    kept = [i for i in entries(p) if i in layout.kept and layout.split[i] != 1]
    merged = bool(spec.running) and any(layout.split[i] > 1 for i in layout.merged)
    values = _tiles(p, 1 if by_r else p.P, 1, processors, config)
    return Cut(
        plan=p,
        statistics=_tiles(p, 1, 1, processors, config),
        values=values,
        gradients=_tiles(p, values.rows, 2, processors, config),
        by_row=_by_row(p, processors, config) if by_r else None,
        across=values.form == "flat" and values.K % 8 == 0,
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
    if x.dtype not in _TYPES:
        return f"there is no kernel for {x.dtype}"
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return "an exported program is kept to torch's own operators"
        return compiled if demanded else "torch.compile's own kernels run; nw.use('triton') demands these"
    if (reason := not_plain(call)) is not None:
        return reason
    if not demanded and (reason := timed.verdict(call)) is not None:
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

    Of the signs there is a bit an element, if there is reason to keep them.
    """
    kernels = _kernels()
    spec, p = call.spec, found.plan
    y, bits = torch.empty_like(x), None
    if keep and saved(call.act, residual is not None) == "bits":
        t = found.values
        bits = x.new_empty(x.numel() // 8 if found.across else t.Q * _parts(t.R, 8), dtype=torch.uint8)
    flags = None if call.mask is None else expand_mask(found, call.mask)
    moves = call.use_batch_stats and call.running_var is not None and not found.merged
    mean, var = (computed(t, found.compute) if moves else None for t in (call.running_mean, call.running_var))
    if call.use_batch_stats:
        statistics = x.new_empty((3, found.Q), dtype=torch.float64)
    else:
        statistics = native.batch_statistics(call, p.layout)
    common: dict[str, Any] = {
        "CENTER": spec.center, "MOVES": moves, "W": weight is not None, "BIAS": bias is not None,
        "RESIDUAL": residual is not None, "BITS": bits is not None, "ACROSS": found.across,
        "ACT": call.act or "none", "MASKED": flags is not None, "COMPUTE": _compute_type(found),
    }  # fmt: skip
    tiles, per = found.statistics, "r" if found.by_row else "row"
    with _on(x):
        if call.use_batch_stats and tiles.splits == 1 and (found.by_row or p.P == 1):
            kernels.forward[tiles.grid[:1]](
                x, flags, y, bits, weight, bias, residual, statistics, mean, var, *tiles.sizes, p.G, found.Q,
                call.eps, call.new_weight, ONE=tiles.one, PER=per, **common, **tiles.constants,
            )  # fmt: skip
        else:
            parts = None
            if call.use_batch_stats:
                parts = x.new_empty((4, tiles.splits, found.Q), dtype=found.compute)
                kernels.partials[tiles.grid](
                    x, flags, parts, *tiles.sizes, tiles.chunk, found.Q, ONE=tiles.one, CENTER=spec.center,
                    MASKED=flags is not None, COMPUTE=common["COMPUTE"], **tiles.constants,
                )  # fmt: skip
            parted, tiles = tiles.splits, found.values
            kernels.apply[tiles.grid](
                x, flags, y, bits, weight, bias, residual, parts, statistics, mean, var, *tiles.sizes,
                tiles.rows, p.G, found.Q, parted, tiles.chunk, call.eps, call.new_weight,
                SPLITS=0 if parts is None else _power(parted), PER=per, **common, **tiles.constants,
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
    p, t = found.plan, found.values
    each = bits.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1
    each = each.view(t.O, t.R, t.K).transpose(1, 2) if found.across else each.view(t.O, t.K, -1)[..., : t.R]
    # (O, K, P, A, S) in the order of memory
    nest = each.reshape(p.O, p.K, t.rows, p.A, p.B // t.rows).permute(0, 3, 1, 2, 4)
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
    tiles = found.gradients
    with _on(x):
        if found.by_row is not None:
            rows, sums = found.by_row, None
            if not rows.one:
                sums = x.new_empty((2, found.Q), dtype=found.compute)
                kernels.backward_row_sums[tiles.grid[:1]](
                    *tensors, sums, *tiles.sizes, p.G, found.Q, eps, **common, **tiles.constants
                )
            parameters = x.new_empty((2, rows.splits, p.G * found.R), dtype=found.compute)
            even = (found.Q // p.G) % rows.BK == 0 and found.R % rows.BR == 0
            kernels.backward_rows[(rows.splits, _parts(found.R, rows.BR), p.G)](
                *tensors, sums, dx, dresidual, parameters, *rows.sizes, p.G, found.Q, rows.chunk, eps,
                KNOWN=sums is not None, CENTER=spec.center, DRESIDUAL=dresidual is not None,
                **common, **rows.constants | {"EVEN": even},
            )  # fmt: skip
            dbias, dweight = parameters.sum(1).unbind()
        else:
            sums = x.new_empty((2, tiles.splits, tiles.Q), dtype=found.compute)
            common |= {"BATCH": use_batch}
            more = {"CENTER": spec.center, "DRESIDUAL": dresidual is not None}
            if tiles.splits == 1 and tiles.rows == 1:
                kernels.backward[tiles.grid[:1]](
                    *tensors, sums, dx, dresidual, *tiles.sizes, p.G, found.Q, eps, ONE=tiles.one,
                    **more, **common, **tiles.constants,
                )  # fmt: skip
            else:
                kernels.backward_partials[tiles.grid](
                    *tensors, sums, *tiles.sizes, tiles.rows, p.G, tiles.chunk, found.Q, eps,
                    **common, **tiles.constants,
                )  # fmt: skip
                parts = min(_power(tiles.splits * tiles.rows), max(1, CONFIG.tile // 2 // tiles.BK))
                kernels.backward_apply[tiles.grid](
                    *tensors, sums, dx, dresidual, *tiles.sizes, tiles.rows, p.G, tiles.splits, tiles.chunk,
                    found.Q, found.R, eps, SUMS=parts, **more, **common, **tiles.constants,
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

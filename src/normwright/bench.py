"""Every kernel on this machine: checked against float64, then timed against torch.

A row is a norm on a shape, memory layout and type, with its activation and residual, forward or forward and backward.
Its layer is first compared with float64, and a wrong one is not timed. Then torch's modules, this package's layer and a
plain copy take turns in one process, so that whatever slows the machine slows all of them; the ratio is the median over
turns of (time of torch) / (time of ours). Both sides have the same input, parameters, threads and allocator.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor, nn

from . import reference
from .allocator import tune_allocator
from .functional import activate
from .kernels.dispatch import explain, use
from .lab.errors import UserError
from .layers import twins

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["Result", "Row", "bench", "command", "quick_rows", "rows", "summary"]

FAMILIES = ("BN", "IN", "GN", "LN", "RMS")
# a sample of a tiny norm is this long at least, in seconds: many clock ticks, many calls
SAMPLE = 1e-3
# turns of a row at the least: quartiles of fewer say nothing
TURNS = 5
# up to this many elements the truth is normwright.reference; its dozen float64 arrays would not fit beyond
REFERENCE_LIMIT = 1 << 20


@dataclass(frozen=True)
class Row:
    """What is timed.

    Arguments:
        family: one of `FAMILIES`. IN is affine; GN has 32 groups, or two channels a group where there are fewer.
        layout: "NCHW", "NHWC" (channels_last), or "" for the dense shapes, which have one layout.
        dtype: of input, residual and gradient. Parameters are float32 for BN, IN and GN, as under autocast, and of the
            input's type for LN and RMS, as in a transformer in bfloat16 (torch's RMS norm warns of any other).
        training: batch statistics; otherwise the running ones.
        backward: forward with gradients and backward; otherwise forward alone, without gradients.
    """

    family: str
    shape: tuple[int, ...]
    layout: str = ""
    dtype: torch.dtype = torch.float32
    act: str | None = None
    residual: bool = False
    training: bool = True
    backward: bool = True

    @property
    def norm(self) -> str:
        """The norm with what follows it, such as "BN+add+relu"."""
        return "+".join([self.family, *(["add"] if self.residual else []), *([self.act] if self.act else [])])

    @property
    def passes(self) -> str:
        """The mode and the passes, such as "train fwd+bwd"."""
        return f"{'train' if self.training else 'eval'} {'fwd+bwd' if self.backward else 'fwd'}"

    @property
    def name(self) -> str:
        """All of it in words; what `--filter` looks at."""
        size = "×".join(map(str, self.shape))
        return " ".join(part for part in (self.norm, size, self.layout, dtype_name(self.dtype), self.passes) if part)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median, and the quartiles as its spread."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """One row measured; `wrong` is empty, or says where the layer differs from float64, and then nothing is timed.

    Arguments:
        kernel: the backend that `explain` reports.
        ratio: (time of torch) / (time of ours), over turns; above 1, ours is faster.
        best: the shortest time of torch over the shortest of ours: what a busy machine spoils least.
        traffic: the least bytes that must move, in sizes of the tensor; see `least_traffic`.
        of_copy: achieved bytes per second of ours, by that count, over those of `y.copy_(x)` in the same turns.
    """

    row: Row
    kernel: str
    wrong: str = ""
    torch: Timing | None = None
    ours: Timing | None = None
    copy: Timing | None = None
    ratio: Timing | None = None
    best: float | None = None
    compiled: Timing | None = None
    compile_error: str = ""
    turns: int = 0
    traffic: int = 0
    of_copy: float = 0.0

    def record(self) -> dict[str, Any]:
        """Everything, for JSON."""
        own = {**asdict(self.row), "dtype": dtype_name(self.row.dtype)}
        rest = {key: value for key, value in asdict(self).items() if key != "row"}
        return {"type": "row", "name": self.row.name, **own, **rest}


# ------------------------------------------------------------------------------------------------------------ the rows

LENET = [(256, 6, 24, 24), (256, 16, 8, 8), (256, 120), (256, 84)]
RESNET = [
    (32, 64, 112, 112), (32, 64, 56, 56), (32, 128, 28, 28), (32, 256, 14, 14), (32, 512, 7, 7),
    (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7),
]  # fmt: skip
IMAGES = [(32, 64, 56, 56), (32, 256, 14, 14)]
TOKENS = [(8192, 768), (2048, 4096), (12608, 384)]
TINY = (8, 4, 8, 8)
BN_VARIANTS: list[dict[str, Any]] = [{}, {"act": "relu"}, {"act": "sigmoid"}, {"act": "relu", "residual": True}]
DTYPES = (torch.float32, torch.bfloat16)


def rows() -> list[Row]:
    """The whole set: training steps at the shapes of LeNet, ResNet-18, ResNet-50 and transformers, then forward alone.

    Training steps are forward and backward, in float32 and bfloat16, images in both layouts, and a tiny input. Forward
    alone, training and evaluation, is taken at a few of these shapes; so are gelu, silu, float64 and float16.
    """
    return list(dict.fromkeys([*_training_rows(), *_forward_rows(), *_other_rows()]))


def quick_rows() -> list[Row]:
    """A dozen small rows that cover every family, layout, type and direction."""
    small = (32, 64, 14, 14)
    return [
        Row("BN", (256, 120)),
        Row("BN", small, "NCHW", act="relu"),
        Row("BN", small, "NHWC", act="relu", residual=True),
        Row("BN", small, "NCHW", torch.bfloat16, act="sigmoid"),
        Row("BN", small, "NCHW", act="relu", training=False, backward=False),
        Row("IN", small, "NCHW"),
        Row("IN", small, "NHWC"),
        Row("GN", small, "NCHW"),
        Row("GN", small, "NHWC", torch.bfloat16),
        Row("LN", (2048, 384)),
        Row("RMS", (2048, 384)),
        Row("BN", TINY, "NCHW"),
    ]


def _layouts(shape: tuple[int, ...]) -> tuple[str, ...]:
    return ("NCHW", "NHWC") if len(shape) == 4 else ("",)


def _training_rows() -> Iterator[Row]:
    for dtype in DTYPES:
        for variant in BN_VARIANTS:
            for shape in (*LENET, *RESNET):
                for layout in _layouts(shape):
                    yield Row("BN", shape, layout, dtype, **variant)
        for family in ("IN", "GN"):
            for shape in IMAGES:
                for layout in _layouts(shape):
                    yield Row(family, shape, layout, dtype)
        for family in ("LN", "RMS"):
            for shape in TOKENS:
                yield Row(family, shape, "", dtype)
    for variant in BN_VARIANTS:
        yield Row("BN", TINY, "NCHW", **variant)
    for family in ("IN", "GN"):
        yield Row(family, TINY, "NCHW")
    for family in ("LN", "RMS"):
        yield Row(family, (8, 256))


def _forward_rows() -> Iterator[Row]:
    for training in (True, False):
        for variant in BN_VARIANTS[:2]:
            for layout in ("NCHW", "NHWC"):
                yield Row("BN", (32, 256, 14, 14), layout, **variant, training=training, backward=False)
    yield Row("BN", (32, 256, 14, 14), "NCHW", act="relu", training=False, backward=True)  # a frozen batch norm
    for family in ("IN", "GN"):
        yield Row(family, (32, 256, 14, 14), "NCHW", backward=False)
    for family in ("LN", "RMS"):
        yield Row(family, (8192, 768), backward=False)


def _other_rows() -> Iterator[Row]:
    for act in ("leaky_relu", "tanh", "silu", "gelu"):
        yield Row("BN", (32, 256, 14, 14), "NCHW", act=act)
    for dtype in (torch.float64, torch.float16):
        yield Row("BN", (32, 256, 14, 14), "NCHW", dtype)
        yield Row("LN", (2048, 4096), "", dtype)


# ------------------------------------------------------------------------------------------------------- the two sides


class Eager(nn.Module):
    """The norm as people write it in torch: a module, the addition, the activation, the last two in place.

    In place as torchvision's ResNets do, which is the faster way and so the harder one to beat.
    """

    def __init__(self, norm: nn.Module, act: str | None) -> None:
        super().__init__()
        self.norm, self.act = norm, act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        if residual is not None:
            y += residual
        return torch.relu_(y) if self.act == "relu" else activate(y, self.act)


def _layer(row: Row, library: Any, **extra: Any) -> nn.Module:
    """The row's module from torch.nn or from this package's twins."""
    channels = row.shape[1]
    if row.family == "BN":
        return (library.BatchNorm2d if len(row.shape) == 4 else library.BatchNorm1d)(channels, **extra)
    if row.family == "IN":
        return library.InstanceNorm2d(channels, affine=True, **extra)
    if row.family == "GN":
        return library.GroupNorm(32 if channels >= 64 else max(1, channels // 2), channels, **extra)
    kind = library.LayerNorm if row.family == "LN" else library.RMSNorm
    return kind(row.shape[-1], eps=1e-6, dtype=row.dtype, **extra)


@dataclass
class Case:
    """A row made: the two modules with the same random parameters and buffers, and the tensors."""

    row: Row
    eager: Eager
    ours: nn.Module
    x: Tensor
    dy: Tensor
    residual: Tensor | None

    @classmethod
    def make(cls, row: Row) -> Case:
        """Random tensors and parameters, the same every time."""
        generator = torch.Generator().manual_seed(0)

        def tensor() -> Tensor:
            t = torch.randn(row.shape, generator=generator).to(row.dtype)
            return t.contiguous(memory_format=torch.channels_last) if row.layout == "NHWC" else t

        ours = _layer(row, twins, act=row.act)
        eager = Eager(_layer(row, nn), row.act)
        if row.dtype == torch.float64:
            ours, eager = ours.double(), eager.double()
        with torch.no_grad():
            for name, value in ours.state_dict().items():
                if name in ("weight", "running_var"):
                    value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
                elif name in ("bias", "running_mean"):
                    value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
        eager.norm.load_state_dict(ours.state_dict())
        x = tensor().add_(0.5)
        case = cls(row, eager.train(row.training), ours.train(row.training), x, tensor(), None)
        if row.residual:
            case.residual = tensor()
        if row.backward:
            for t in case.leaves():
                t.requires_grad_()
        return case

    def leaves(self) -> list[Tensor]:
        """What gradients are asked for, but the parameters."""
        return [self.x] if self.residual is None else [self.x, self.residual]

    def step(self, module: Callable[..., Tensor], owner: nn.Module) -> Callable[[], object]:
        """A call that does the row's passes with `module`, whose parameters are those of `owner`."""
        x, residual, dy = self.x, self.residual, self.dy
        inputs = [*self.leaves(), *owner.parameters()]
        arguments = (x,) if residual is None else (x, residual)

        def forward() -> object:
            with torch.no_grad():
                return module(*arguments)

        def both() -> object:
            return torch.autograd.grad(module(*arguments), inputs, dy)

        return both if self.row.backward else forward


# ------------------------------------------------------------------------------------------------------------ checking


def tolerance(dtype: torch.dtype, n: int) -> float:
    """The largest error of a result stored as `dtype` from sums over `n` values, relative to the truth's largest.

    Formula: `8 · (eps(stored) + (sqrt(n) + 1) · eps(summed))`: roundings of a sum add as a random walk, and a handful
    follow one another.
    """
    summed = torch.float64 if dtype == torch.float64 else torch.float32
    return 8 * (torch.finfo(dtype).eps + (math.sqrt(n) + 1) * torch.finfo(summed).eps)


def check(case: Case) -> str:
    """Compare output, gradients and running statistics of our layer with float64; a sentence if one is wrong, or "".

    Up to a million elements the truth is `normwright.reference`; beyond, torch's own modules in float64, because the
    reference keeps about a dozen arrays of eight bytes an element. Gradients are checked with dy = 0 where the argument
    of the activation is so near 0 that rounding decides on which side of the kink it lies.
    """
    row, ours = case.row, case.ours
    small = case.x.numel() <= REFERENCE_LIMIT
    truth, dy = (_by_reference if small else _by_torch)(case)
    arguments = [case.x] if case.residual is None else [case.x, case.residual]
    with torch.set_grad_enabled(row.backward):
        y = ours(*arguments)
    if y.dtype != row.dtype or y.stride() != case.x.stride():
        return f"the output is {y.dtype} with strides {y.stride()}, the input {row.dtype} with {case.x.stride()}"
    found: dict[str, Tensor] = {"the output": y.detach()}
    if row.backward:
        names = ["dx", *(["dresidual"] if row.residual else [])]
        parameters = dict(ours.named_parameters())
        gradients = torch.autograd.grad(y, [*case.leaves(), *parameters.values()], dy)
        found.update(zip([*names, *(f"d{name}" for name in parameters)], gradients, strict=True))
    found.update({name: b for name, b in ours.named_buffers() if name != "num_batches_tracked"})
    for name, actual in found.items():
        reduced = max(1, case.x.numel() // max(_statistics(row), 1))
        if name in ("dweight", "dbias"):
            reduced = max(reduced, case.x.numel() // actual.numel())
        want = truth[name].to(torch.float64)
        if actual.shape != want.shape:
            return f"{name} has shape {tuple(actual.shape)}, expected {tuple(want.shape)}"
        # composed of torch's operators, the output and gradients pass through the input's type on their way
        stored = actual.dtype if name.startswith("running") else row.dtype
        allowed = tolerance(stored, reduced) * want.abs().max().item()
        error = (actual.detach().to(torch.float64) - want).abs().max().item()
        if not error <= allowed:  # NaN too
            return f"{name} is off by {error:.2g} from float64, allowed {allowed:.2g}"
    return ""


def _statistics(row: Row) -> int:
    """The number of statistics."""
    N, C = row.shape[:2]
    if row.family == "BN":
        return C
    if row.family == "IN":
        return N * C
    return N * (32 if C >= 64 else max(1, C // 2)) if row.family == "GN" else N


def _without_kinks(dy: Tensor, z: Tensor, act: str | None) -> Tensor:
    if act not in ("relu", "leaky_relu"):
        return dy
    near = max(1e-3, 8 * torch.finfo(dy.dtype).eps)
    return torch.where(z.abs() < near, torch.zeros((), dtype=dy.dtype), dy)


def _by_reference(case: Case) -> tuple[dict[str, Tensor], Tensor]:
    row, ours = case.row, case.ours

    def array(t: Tensor | None) -> Any:
        return None if t is None else t.detach().double().numpy()

    state = ours.state_dict()
    spec: Any = ours.spec
    y, cache = reference.forward(
        array(case.x), spec, array(state["weight"]), array(state.get("bias")), eps=ours.eps, act=row.act,  # type: ignore[arg-type]
        residual=array(case.residual), running_mean=array(state.get("running_mean")),
        running_var=array(state.get("running_var")), use_batch_stats=row.training,
    )  # fmt: skip
    dy = _without_kinks(case.dy, torch.from_numpy(cache.z.reshape(row.shape)), row.act)
    truth = {"the output": y, **reference.backward(array(dy), cache)}
    for name, value in (("running_mean", cache.running_mean), ("running_var", cache.running_var)):
        if value is not None:
            truth[name] = value
    return {name: torch.as_tensor(value) for name, value in truth.items()}, dy


def _by_torch(case: Case) -> tuple[dict[str, Tensor], Tensor]:
    row = case.row
    norm = _layer(row, nn)
    norm.load_state_dict(case.ours.state_dict())
    norm = norm.double().train(row.training)
    x = case.x.detach().double().requires_grad_(row.backward)
    residual = None if case.residual is None else case.residual.detach().double().requires_grad_(row.backward)
    with torch.set_grad_enabled(row.backward):
        z = norm(x) if residual is None else norm(x) + residual
        y = activate(z, row.act)
    dy = _without_kinks(case.dy, z.detach(), row.act)
    truth = {"the output": y.detach(), **dict(norm.named_buffers())}
    if row.backward:
        parameters = dict(norm.named_parameters())
        leaves = [x] if residual is None else [x, residual]
        gradients = torch.autograd.grad(y, [*leaves, *parameters.values()], dy.double())
        names = ["dx", *(["dresidual"] if row.residual else []), *(f"d{name}" for name in parameters)]
        truth.update(zip(names, gradients, strict=True))
    return truth, dy


# -------------------------------------------------------------------------------------------------------------- timing


def least_traffic(row: Row, cache_bytes: int) -> int:
    """The least that must move between memory and processor, in sizes of the tensor.

    Forward reads x and writes y: 2, and with training 3 if a tile does not stay in cache between its two readings; a
    residual adds 1. Backward reads x and dy and writes dx: 3, or 5 if they must be read again; with a residual and an
    activation it writes the residual's gradient: 1 more. A tile is what one statistic sums (for NHWC, whose statistics
    lie side by side, the sample or, for batch norm, the batch); it stays if it fits in a core's second-level cache.
    """
    side_by_side = row.layout == "NHWC" or (row.family == "BN" and len(row.shape) == 2)
    tiles = _statistics(row)
    if side_by_side:
        tiles = 1 if row.family == "BN" else row.shape[0]
    tile = math.prod(row.shape) // tiles * row.dtype.itemsize
    again = row.training or row.family in ("LN", "RMS", "IN", "GN")
    forward = 2 + row.residual + (again and tile > cache_bytes)
    backward = 3 + (row.residual and row.act is not None) + 2 * (again and 2 * tile > cache_bytes)
    return forward + (backward if row.backward else 0)


def second_level_cache() -> int:
    """Bytes of a core's second-level cache where Linux tells, else 1 MiB."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    if not path.exists():
        return 1 << 20
    text = path.read_text().strip()
    return int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]]


def _sample(call: Callable[[], object], inner: int) -> float:
    began = time.perf_counter()
    for _ in range(inner):
        call()
    return (time.perf_counter() - began) / inner


def _spread(values: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high)


def measure(calls: dict[str, Callable[[], object]], repeat: int, seconds: float) -> dict[str, list[float]]:
    """Seconds a call of each, in turns; every other turn backwards, so that nobody always follows the same one.

    Stops after `repeat` turns, or after `seconds` if there are `TURNS` turns by then.
    """
    inner = {}
    for name, call in calls.items():
        call()
        once = min(_sample(call, 1) for _ in range(2))
        inner[name] = max(1, math.ceil(SAMPLE / max(once, 1e-7)))
        if inner[name] > 1:  # the first calls were slower than the rest
            inner[name] = max(1, math.ceil(SAMPLE / _sample(call, inner[name])))
    times: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        began = time.perf_counter()
        for turn in range(repeat):
            if turn >= TURNS and time.perf_counter() - began > seconds:
                break
            for name in list(calls)[:: 1 if turn % 2 else -1]:
                times[name].append(_sample(calls[name], inner[name]))
    finally:
        if collecting:
            gc.enable()
    return times


def measure_row(row: Row, *, repeat: int, seconds: float, compiled: bool = False) -> Result:
    """Check the row, then time it."""
    case = Case.make(row)
    arguments = [case.x] if case.residual is None else [case.x, case.residual]
    kernel = explain(case.ours, *arguments).kernel
    wrong = check(case)
    if wrong:
        return Result(row, kernel, wrong)
    source, target = case.x.detach(), torch.empty_like(case.x.detach())
    calls = {
        "torch": case.step(case.eager, case.eager),
        "ours": case.step(case.ours, case.ours),
        "copy": lambda: target.copy_(source),
    }
    compile_error = ""
    if compiled:
        torch.compiler.reset()
        call = case.step(torch.compile(case.eager), case.eager)
        try:
            call()
            calls["compiled"] = call
        except Exception as error:  # compilers fail in ways of their own; the row says so and goes on
            compile_error = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    times = measure(calls, repeat, seconds)
    spread = {name: _spread(values) for name, values in times.items()}
    traffic = least_traffic(row, second_level_cache())
    return Result(
        row,
        kernel,
        torch=spread["torch"],
        ours=spread["ours"],
        copy=spread["copy"],
        ratio=_spread([a / b for a, b in zip(times["torch"], times["ours"], strict=True)]),
        best=min(times["torch"]) / min(times["ours"]),
        compiled=spread.get("compiled"),
        compile_error=compile_error,
        turns=len(times["ours"]),
        traffic=traffic,
        of_copy=statistics.median(traffic / 2 * c / o for c, o in zip(times["copy"], times["ours"], strict=True)),
    )


# ------------------------------------------------------------------------------------------------------- the whole run


@dataclass(frozen=True)
class Summary:
    """Geometric means of the ratios (torch / ours), the worst row, and what was refused."""

    rows: int
    mean: float | None
    families: dict[str, float]
    worst: str
    worst_ratio: float | None
    slower: int
    wrong: dict[str, str] = field(default_factory=dict)


def summary(results: Iterable[Result]) -> Summary:
    """The geometric means of all timed rows and of every family, the worst row, the number of rows below 1."""
    results = list(results)
    timed = [(r.row, r.ratio.median) for r in results if r.ratio is not None]
    worst = min(timed, key=lambda pair: pair[1], default=None)
    families = {
        family: statistics.geometric_mean(ratios)
        for family in FAMILIES
        if (ratios := [ratio for row, ratio in timed if row.family == family])
    }
    return Summary(
        rows=len(results),
        mean=statistics.geometric_mean([ratio for _, ratio in timed]) if timed else None,
        families=families,
        worst=worst[0].name if worst else "",
        worst_ratio=worst[1] if worst else None,
        slower=sum(ratio < 1 for _, ratio in timed),
        wrong={r.row.name: r.wrong for r in results if r.wrong},
    )


def environment(allocator: str) -> dict[str, Any]:
    """Machine, versions, commit, threads, date, load; what a figure needs to be worth anything."""
    from .lab.journal import environment as machine

    return {
        "type": "environment",
        **machine(),
        "numba": version("numba"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cache_bytes": second_level_cache(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "allocator": allocator,
        "load": load(),
    }


def load() -> float | None:
    """The load average over the last minute, in processes, where the system tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def bench(
    chosen: Iterable[Row],
    *,
    repeat: int = 30,
    seconds: float = 1.0,
    compiled: bool = False,
    kernel: str | None = None,
    done: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Check and time the rows one after another; `done` is called with each result as it is there.

    Arguments:
        repeat: turns of a row at most, at least `TURNS`.
        seconds: time for the turns of a row; checking and compiling are not counted.
        compiled: time `torch.compile` of torch's modules too. Every row is compiled anew, several seconds each.
        kernel: demand a kernel, as `nw.use` does; by default the library chooses.
    """
    if repeat < TURNS:
        raise ValueError(f"Quartiles need at least {TURNS} turns; got repeat={repeat}.")
    results = []
    with use(kernel):
        for row in chosen:
            results.append(measure_row(row, repeat=repeat, seconds=seconds, compiled=compiled))
            done(results[-1])
    return results


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def command(
    filter_: Annotated[
        str,
        typer.Option("--filter", help="Rows with all of these words in the name, as in --filter 'BN relu NHWC'."),
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="A dozen small rows, few turns: does it run at all?")] = False,
    training: Annotated[
        bool, typer.Option("--training", help="Only training steps, forward and backward: the project's target.")
    ] = False,
    repeat: Annotated[int, typer.Option(help="Turns of a row at most.", min=TURNS)] = 30,
    seconds: Annotated[float, typer.Option(help="Time for the turns of a row, beyond the first five.", min=0)] = 1.0,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Time torch.compile too; left out by default, for it compiles every row anew."),
    ] = False,
    kernel: Annotated[str | None, typer.Option(help="Demand a kernel: cpu or native.", show_default="the best")] = None,
    threads: Annotated[int | None, typer.Option(help="Torch's threads.", min=1, show_default="as they are")] = None,
    tune: Annotated[
        bool,
        typer.Option("--tune-allocator/--no-tune-allocator", help="Keep freed memory, for both sides alike."),
    ] = True,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON lines and nothing else.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the JSON lines to a file too.", show_default=False)] = None,
) -> None:
    """Check every kernel against float64 and time it against torch; exit code 1 if one is wrong."""
    from rich.console import Console

    words = filter_.lower().split()
    chosen = [row for row in (quick_rows() if quick else rows()) if all(w in row.name.lower() for w in words)]
    if training:
        chosen = [row for row in chosen if row.training and row.backward]
    if not chosen:
        raise UserError(f"No row has all of {filter_!r} in its name; a name is, for example, {rows()[0].name!r}.")
    if quick:
        repeat, seconds = min(repeat, 7), min(seconds, 0.2)
    with _threads(threads):
        results = _run(chosen, repeat, seconds, compiled, kernel, tune, json_, out, Console(stderr=True))
    if any(result.wrong for result in results):
        raise typer.Exit(1)


def _run(
    chosen: list[Row], repeat: int, seconds: float, compiled: bool, kernel: str | None, tune: bool, json_: bool,
    out: Path | None, errors: Console,
) -> list[Result]:  # fmt: skip
    """The rows with a progress bar, JSON lines as they come, and the table at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    about = environment(tune_allocator().reason if tune else "As it is.")
    busy = about["load"]
    if busy is not None and busy > 0.5:
        errors.print(
            f"The machine is busy: {busy:.1f} processes ran on average in the last minute, before this one. "
            "Look at the quartiles, and run it again when the machine is quiet.",
            style="yellow",
            soft_wrap=True,
        )
    lines: list[dict[str, Any]] = []

    def say(record: dict[str, Any]) -> None:
        lines.append(record)
        if json_:
            typer.echo(json.dumps(record, ensure_ascii=False))
        if out is not None:
            out.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")

    say(about)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task(chosen[0].name, total=len(chosen))

        def done(result: Result) -> None:
            say(result.record())
            at = chosen.index(result.row) + 1
            progress.update(task, advance=1, description=chosen[min(at, len(chosen) - 1)].name)

        results = bench(chosen, repeat=repeat, seconds=seconds, compiled=compiled, kernel=kernel, done=done)
    total = summary(results)
    say({"type": "summary", **asdict(total), "load": load(), "kernels": _compile_times()})
    if not json_:
        found = table(results)
        # a line that wraps can be read, a cell that is cut cannot
        console = Console(width=max(Console().width, Console(width=1000).measure(found).maximum))
        console.print(found)
        for line in remarks(about, results, total):
            console.print(line, highlight=False, soft_wrap=True)
    return results


def _compile_times() -> dict[str, dict[str, float]]:
    """How many CPU kernels were compiled and loaded in this process, and the seconds that took."""
    from .kernels.cpu.build import compile_times

    found: dict[str, dict[str, float]] = {}
    for how, seconds in compile_times.values():
        entry = found.setdefault(how, {"kernels": 0, "seconds": 0.0})
        entry["kernels"] += 1
        entry["seconds"] += seconds
    return found


def _duration(timing: Timing | None) -> str:
    if timing is None:
        return "–"
    return f"{timing.median * 1e3:.3g} ms" if timing.median >= 1e-3 else f"{timing.median * 1e6:.3g} µs"


def table(results: Sequence[Result]) -> RenderableType:
    """The rows as a table for the terminal."""
    from rich.table import Table

    compiled = any(r.compiled is not None or r.compile_error for r in results)
    found = Table(box=None, pad_edge=False)
    for head in ("norm", "shape", "layout", "type", "passes", "kernel"):
        found.add_column(head, no_wrap=True)
    heads = ["torch", *(["torch.compile"] if compiled else []), "ours"]
    heads += ["torch/ours", "quartiles", "of bests", "sizes", "of copy"]
    for head in heads:
        found.add_column(head, justify="right", no_wrap=True)
    for r in results:
        shape = "×".join(map(str, r.row.shape))
        cells = [r.row.norm, shape, r.row.layout, dtype_name(r.row.dtype), r.row.passes, r.kernel]
        if r.ratio is None:
            found.add_row(*cells, "not timed", *[""] * (len(heads) - 1), style="red")
            continue
        cells.append(_duration(r.torch))
        if compiled:
            cells.append("failed" if r.compile_error else _duration(r.compiled))
        cells += [_duration(r.ours), f"{r.ratio.median:.2f}", f"{r.ratio.low:.2f}–{r.ratio.high:.2f}", f"{r.best:.2f}"]
        found.add_row(*cells, str(r.traffic), f"{r.of_copy:.0%}", style="yellow" if r.ratio.median < 1 else "")
    return found


def remarks(about: dict[str, Any], results: Sequence[Result], total: Summary) -> list[str]:
    """What stands below the table: how to read it, the machine, the means, the worst row, what was wrong."""
    turns = [r.turns for r in results if r.turns]
    lines = [
        "",
        "torch/ours: median over turns, above 1 ours is faster; of bests: of the shortest times, which a busy machine "
        "spoils least. sizes: the least traffic in sizes of the tensor, where a tile stays in cache up to "
        f"{about['cache_bytes'] / 2**20:g} MiB; of copy: that traffic per second against y.copy_(x).",
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, {about['capability']}; "
        f"torch {about['torch']}, python {about['python']}, normwright {about['normwright']} at {about['commit']}; "
        f"{about['date']}; load {about['load']} at the start.",
        f"Allocator, one for both sides: {about['allocator']}",
    ]
    if turns:
        lines.append(f"Turns a row: {min(turns)} to {max(turns)}. Seed 0.")
    times = _compile_times()
    if times:
        parts = [f"{int(entry['kernels'])} {how} in {entry['seconds']:.1f} s" for how, entry in times.items()]
        lines.append(f"Kernels: {', '.join(parts)}.")
    for r in results:
        if r.compile_error:
            lines.append(f"torch.compile failed on {r.row.name}: {r.compile_error}")
    for name, wrong in total.wrong.items():
        lines.append(f"WRONG and not timed: {name}: {wrong}.")
    if total.mean is not None:
        families = ", ".join(f"{family} {mean:.2f}" for family, mean in total.families.items())
        lines.append("")
        lines.append(f"Geometric mean of {total.rows - len(total.wrong)} rows: {total.mean:.2f} ({families}).")
        lines.append(f"Worst row: {total.worst}: {total.worst_ratio:.2f}; {total.slower} rows below 1.")
    return lines

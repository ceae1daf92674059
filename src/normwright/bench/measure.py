"""Rows checked and then timed in turns, and what the times amount to."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from ..kernels.dispatch import explain, use
from .cases import Case, Truth, check
from .devices import Cpu, Device
from .others import others_of
from .row import FAMILIES, Row, dtype_name, least_traffic

# turns of a row at the least: quartiles of fewer say nothing
TURNS = 5


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
        others: the times of torch.compile and of other libraries, by name.
        against: the ratios of these times to ours, as `ratio`.
        left_out: why another was not timed, by name.
        traffic: the least bytes that must move, in sizes of the tensor; see `least_traffic`.
        of_copy: achieved bytes per second of ours, by that count, over those of `y.copy_(x)` in the same turns.
        copies: sets of the same tensors that took turns; see `rotation`.
    """

    row: Row
    kernel: str
    wrong: str = ""
    torch: Timing | None = None
    ours: Timing | None = None
    copy: Timing | None = None
    ratio: Timing | None = None
    best: float | None = None
    others: dict[str, Timing] = field(default_factory=dict)
    against: dict[str, Timing] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    turns: int = 0
    traffic: int = 0
    of_copy: float = 0.0
    copies: int = 1

    def record(self) -> dict[str, Any]:
        """Everything, for JSON."""
        own = {**asdict(self.row), "dtype": dtype_name(self.row.dtype)}
        rest = {key: value for key, value in asdict(self).items() if key != "row"}
        return {"type": "row", "name": self.row.name, **own, **rest}


def rotation(case: Case, l2_bytes: int) -> list[Case]:
    """The case and copies of it, used in turns so that no input is in cache from the turn before.

    Together the x of all exceed `2 · l2_bytes`. They are two at least: a kernel that reads backwards finds the end of
    even the largest tensor. Outputs do not rotate; the allocator hands out the same memory again, for torch, for ours,
    and so for the copy. Without a size of the cache the case stays alone.
    """
    count = max(2, 2 * l2_bytes // case.x.nbytes + 1) if l2_bytes else 1
    return [case, *(case.copy() for _ in range(count - 1))]


def _in_turns(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A call that does the next of `calls` each time."""
    if len(calls) == 1:
        return calls[0]
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def _spread(values: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high)


def measure(
    calls: dict[str, Callable[[], object]], repeat: int, seconds: float, device: Device
) -> dict[str, list[float]]:
    """Seconds a call of each, in turns; every other turn backwards, so that nobody always follows the same one.

    Stops after `repeat` turns, or after `seconds` if there are `TURNS` turns by then.
    """
    inner = {}
    for name, call in calls.items():
        call()
        once = min(device.sample(call, 1) for _ in range(2))
        inner[name] = max(1, math.ceil(device.sample_seconds / max(once, 1e-7)))
        if inner[name] > 1:  # the first calls were slower than the rest
            inner[name] = max(1, math.ceil(device.sample_seconds / device.sample(call, inner[name])))
    times: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        began = time.perf_counter()
        for turn in range(repeat):
            if turn >= TURNS and time.perf_counter() - began > seconds:
                break
            for name in list(calls)[:: 1 if turn % 2 else -1]:
                times[name].append(device.sample(calls[name], inner[name]))
    finally:
        if collecting:
            gc.enable()
    return times


def _story(error: Exception) -> str:
    """The first line of an error, for a row that says so and goes on."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def measure_row(row: Row, *, repeat: int, seconds: float, device: Device, compiled: bool = False) -> Result:
    """Check the row, then time it."""
    case = Case.make(row, device.place)
    truth = Truth.of(case)
    kernel = "none"
    try:
        with torch.set_grad_enabled(row.backward):
            kernel = explain(case.ours, *case.leaves()).kernel
        wrong = check(case, truth, case.ours, case.ours)
    except Exception as error:  # a compiler's, a driver's, a demanded kernel's; the row says so and the others go on
        wrong = _story(error)
    if wrong:
        return Result(row, kernel, wrong)
    cases = rotation(case, device.l2_bytes)
    target = torch.empty_like(case.x.detach())
    others: dict[str, Callable[[], object]] = {}
    left_out = {}
    for name, make in others_of(row, compiled, device.libraries).items():
        try:
            module, owner = make(case)
            wrong = check(case, truth, module, owner)
            call = _in_turns([each.step(module, owner) for each in cases])
            call()
        except Exception as error:  # others fail in ways of their own
            wrong = _story(error)
        if wrong:
            left_out[name] = wrong
        else:
            others[name] = call
    calls = {
        "torch": _in_turns([each.step(case.eager, case.eager) for each in cases]),
        "ours": _in_turns([each.step(case.ours, case.ours) for each in cases]),
        "copy": _in_turns([partial(target.copy_, each.x.detach()) for each in cases]),
        **others,
    }
    times = measure(calls, repeat, seconds, device)
    traffic = least_traffic(row, device.tile_bytes)

    def against(name: str) -> Timing:
        return _spread([a / b for a, b in zip(times[name], times["ours"], strict=True)])

    return Result(
        row,
        kernel,
        torch=_spread(times["torch"]),
        ours=_spread(times["ours"]),
        copy=_spread(times["copy"]),
        ratio=against("torch"),
        best=min(times["torch"]) / min(times["ours"]),
        others={name: _spread(times[name]) for name in others},
        against={name: against(name) for name in others},
        left_out=left_out,
        turns=len(times["ours"]),
        traffic=traffic,
        of_copy=statistics.median(traffic / 2 * c / o for c, o in zip(times["copy"], times["ours"], strict=True)),
        copies=len(cases),
    )


def bench(
    chosen: Iterable[Row],
    *,
    repeat: int = 30,
    seconds: float = 1.0,
    compiled: bool = False,
    kernel: str | None = None,
    device: Device | None = None,
    done: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Check and time the rows one after another; `done` is called with each result as it is there.

    Arguments:
        repeat: turns of a row at most, at least `TURNS`.
        seconds: time for the turns of a row; checking and compiling are not counted.
        compiled: time `torch.compile` of torch's modules too. Every row is compiled anew, several seconds each.
        kernel: demand a kernel, as `nw.use` does; by default the library chooses on the CPU, and Triton's kernels are
            demanded on a GPU, where the library would still choose torch's operators.
        device: `Cpu()`, the default, or `Cuda()`.
    """
    device = device or Cpu()
    if repeat < TURNS:
        raise ValueError(f"Quartiles need at least {TURNS} turns; got repeat={repeat}.")
    results = []
    with use(kernel or device.kernel):
        for row in chosen:
            results.append(measure_row(row, repeat=repeat, seconds=seconds, device=device, compiled=compiled))
            done(results[-1])
    return results


@dataclass(frozen=True)
class Summary:
    """Geometric means of the ratios (torch / ours), the worst row, and what was refused.

    Arguments:
        others: by name, of torch.compile and other libraries: rows, the geometric mean of (other / ours), the worst.
        of_copy: by norm and passes, where a tensor exceeds the GPU's cache: rows, the median of `of_copy`, the least.
    """

    rows: int
    mean: float | None
    families: dict[str, float]
    worst: str
    worst_ratio: float | None
    slower: int
    wrong: dict[str, str] = field(default_factory=dict)
    others: dict[str, tuple[int, float, float]] = field(default_factory=dict)
    of_copy: dict[str, tuple[int, float, float]] = field(default_factory=dict)


def summary(results: Iterable[Result], l2_bytes: int = 0) -> Summary:
    """The geometric means of all timed rows and of every family, the worst row, the number of rows below 1.

    Arguments:
        l2_bytes: the GPU's cache; 0 on a CPU, where no fraction of a copy is summed up.
    """
    results = list(results)
    timed = [(r.row, r.ratio.median) for r in results if r.ratio is not None]
    worst = min(timed, key=lambda pair: pair[1], default=None)
    families = {
        family: statistics.geometric_mean(ratios)
        for family in FAMILIES
        if (ratios := [ratio for row, ratio in timed if row.family == family])
    }
    others: dict[str, list[float]] = {}
    of_copy: dict[str, list[float]] = {}
    for r in results:
        for name, timing in r.against.items():
            others.setdefault(name, []).append(timing.median)
        if r.ratio is not None and 0 < l2_bytes < math.prod(r.row.shape) * r.row.dtype.itemsize:
            of_copy.setdefault(f"{r.row.norm} {r.row.passes}", []).append(r.of_copy)
    return Summary(
        rows=len(results),
        mean=statistics.geometric_mean([ratio for _, ratio in timed]) if timed else None,
        families=families,
        worst=worst[0].name if worst else "",
        worst_ratio=worst[1] if worst else None,
        slower=sum(ratio < 1 for _, ratio in timed),
        wrong={r.row.name: r.wrong for r in results if r.wrong},
        others={name: (len(v), statistics.geometric_mean(v), min(v)) for name, v in others.items()},
        of_copy={name: (len(v), statistics.median(v), min(v)) for name, v in of_copy.items()},
    )

"""Which kernel is faster on the GPU at hand: `calibrate` times both there, and calls like the timed ones follow.

On the CPU the crossings between kernels are measured constants. A GPU's depend on which GPU it is, so they are measured
by who has it, on the calls that matter to them. Nothing is timed behind anyone's back: a call that is like no timed one
takes torch's operators, and `explain` says so.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ..lab.errors import UserError
from ..lab.files import atomic_write
from . import native
from .call import Call
from .cpu.build import cache_directory

__all__ = ["Calibration", "Timed", "by_clock", "by_events", "calibrate", "verdict"]

ROUNDS = 9
SAMPLE_SECONDS = 2e-3  # of a shorter sample the host's gaps, tens of microseconds, would be percents
WORTH = 1.03  # ties go to torch's operators, and medians of nine differ by less on their own
LIKE = 2.0  # a call is like a timed one with so many times as few or as many values

# GPU -> kind of call -> values -> what was found
_table: dict[str, dict[str, dict[int, Timed]]] = {}


@dataclass(frozen=True)
class Timed:
    """One kind of call at one size, timed on one GPU.

    Arguments:
        native, ours: seconds of a call with torch's operators and with these kernels, backward included where the call
            wants gradients; 0 where they were not timed.
        ratio: median of native / ours over interleaved rounds.
        spread: its quartiles.
        wrong: why these kernels are not used whatever they take, or "".
    """

    native: float
    ours: float
    ratio: float
    spread: tuple[float, float]
    wrong: str = ""

    @property
    def chosen(self) -> bool:
        return not self.wrong and self.ratio >= WORTH

    def __str__(self) -> str:
        if self.wrong:
            return f"these kernels {self.wrong}"
        return f"{self.ratio:.2f} times as fast as torch's operators when timed on this GPU"


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found, call by call: where, pattern and shape, and the times."""

    device: str
    calls: tuple[tuple[str, str, tuple[int, ...], Timed], ...]

    def __str__(self) -> str:
        lines = [f"Timed on {self.device}, medians of {ROUNDS} interleaved rounds:"]
        for where, pattern, shape, t in self.calls:
            head = f"  {where or 'call'}: {pattern!r} on {shape}: "
            if t.wrong:
                lines.append(f"{head}torch's operators, for {t}")
                continue
            low, high = t.spread
            lines.append(
                f"{head}{t.native * 1e6:.0f} µs by torch's operators, {t.ours * 1e6:.0f} µs by these kernels, "
                f"{t.ratio:.2f}× ({low:.2f} to {high:.2f}): {'triton' if t.chosen else 'native'}"
            )
        return "\n".join(lines)


@lru_cache(maxsize=64)
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)


def _wants_gradients(call: Call) -> bool:
    tensors = (call.x, call.weight, call.bias, call.residual)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _features(call: Call, gradients: bool) -> tuple:
    """What may decide which kernel is faster."""
    x = call.x
    # channels do not vary from call to call, so that their number is no size
    parameters = next((t.numel() for t in (call.weight, call.running_var) if t is not None), 0)
    return (
        call.spec, x.shape, x.stride(), x.dtype, parameters, call.weight is not None, call.bias is not None,
        call.running_var is not None, call.use_batch_stats, call.act, call.residual is not None,
        call.mask is not None, gradients,
    )  # fmt: skip


def _kind(features: tuple) -> str:
    """What calls share that differ in size alone, in words that a file can keep."""
    spec, shape, strides, dtype, *rest = features
    order = sorted(range(len(shape)), key=lambda d: (-strides[d], d))
    named = [spec.pattern, spec.affine, spec.center, *map(list, spec.sizes)]
    return json.dumps([*named, order, str(dtype), *rest])


def verdict(call: Call) -> str | None:
    """Why torch's operators run this call and not the GPU's kernels, or None where those were faster."""
    return _verdict(_name(call.x.device), _features(call, _wants_gradients(call)))


@lru_cache(maxsize=4096)
def _verdict(device: str, features: tuple) -> str | None:
    values = math.prod(features[1])
    sizes = _load(device).get(_kind(features), {})
    like = [n for n in sizes if n / LIKE <= values <= n * LIKE]
    if not like:
        return "no call like this was timed on this GPU; nw.calibrate(model, inputs) times it"
    found = sizes[min(like, key=lambda n: abs(math.log(values / n)))]
    return None if found.chosen else str(found)


# ------------------------------------------------------------------------------------------------------------ the disk


@cache
def _version() -> str:
    """A digest of all that decides the times but the GPU: torch, Triton, and these kernels."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        compiler = version("triton")
    except PackageNotFoundError:
        compiler = ""
    sources = sorted((Path(__file__).parent / "triton").glob("*.py"))
    parts = [torch.__version__, compiler, *(path.read_text(encoding="utf-8") for path in sources)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _path(device: str) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in device)
    return cache_directory().parent / "timed" / f"{name}-{_version()}.json"


def _load(device: str) -> dict[str, dict[int, Timed]]:
    """What is known of a GPU: from this process, else from the disk."""
    if device not in _table:
        _table[device] = _read(_path(device))
    return _table[device]


def _read(path: Path) -> dict[str, dict[int, Timed]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        found: dict[str, dict[int, Timed]] = {}
        for kind, values, *numbers, spread, wrong in rows:
            timed = Timed(*map(float, numbers), tuple(spread), str(wrong))  # type: ignore[arg-type]
            found.setdefault(kind, {})[int(values)] = timed
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        warnings.warn(
            f"What was timed on this GPU cannot be read from {path} ({error}); torch's operators run until "
            "nw.calibrate(model, inputs) has timed them again.",
            stacklevel=2,
        )
        return {}


def _save(device: str) -> None:
    """Whole and renamed into place, with what other processes have found meanwhile."""
    path = _path(device)
    known = _read(path)
    for kind, sizes in _table[device].items():
        known.setdefault(kind, {}).update(sizes)
    _table[device] = known
    rows = [
        [kind, values, t.native, t.ours, t.ratio, list(t.spread), t.wrong]
        for kind, sizes in known.items()
        for values, t in sizes.items()
    ]
    try:
        atomic_write(path, [json.dumps(rows).encode()])
    except UserError as error:
        warnings.warn(f"What was timed cannot be kept, and holds in this process alone: {error}", stacklevel=3)


# ------------------------------------------------------------------------------------------------------------- timing


def calibrate(module: nn.Module, *inputs: object, **kwargs: object) -> Calibration:
    """Time every normalization of `module(*inputs)` on its GPU, with torch's operators and with the Triton kernels.

    Runs the forward pass once to see the calls (buffers and the random state of the CPU are put back), then both ways
    on random tensors of the same sizes: forward and backward where gradients are wanted, interleaved, by the GPU's
    events. These kernels are held to float64 first; what is wrong, or does not compile, is never chosen. From then on
    calls of the same kind, with half to twice as many values, take the faster way, in this process and in later ones:
    the times are kept in the user's cache directory, for this GPU, this torch and these kernels.

    Arguments:
        inputs, kwargs: as the model is called; on a GPU, with the batch that it will see. Torch's grad mode counts:
            calibrate under `torch.no_grad()`, and in evaluation mode, what will run so.

    Returns: a `Calibration`; its text is a line for every different call.

    Raises: ValueError if a normalization's input is not on a GPU.

    Example:
        >>> import torch
        >>> import normwright as nw
        >>> if torch.cuda.is_available():
        ...     model, x = nw.BatchNorm2d(64).cuda(), torch.randn(128, 64, 56, 56, device="cuda")
        ...     print(nw.calibrate(model, x))
    """
    from . import dispatch

    found: dict[tuple, tuple[str, str, tuple[int, ...], Timed]] = {}
    devices: list[torch.device] = []
    seen = dispatch.recorded(module, inputs, kwargs)
    for choice, call, device in zip(seen.choices, seen.calls, seen.devices, strict=True):
        if dispatch.own_backend(device) != "triton":
            where = choice.where or "a normalization"
            raise ValueError(
                f"calibrate times the kernels of a GPU; the input of {where} is on {device}, where it is known which "
                "kernel is faster. Move the model and its inputs to a GPU."
            )
        gradients = _wants_gradients(call)
        key = (device, _kind(_features(call, gradients)), call.x.numel())
        if key not in found:
            devices.append(device)
            found[key] = (choice.where, choice.pattern, choice.shape, _time(call, gradients, device))
    if not found:
        raise ValueError("calibrate saw no call of normwright's kernels; nw.accelerate(model).model makes them")
    for (device, kind, values), (*_, timed) in found.items():
        _load(_name(device)).setdefault(kind, {})[values] = timed
    for device in dict.fromkeys(map(_name, devices)):
        _save(device)
    _verdict.cache_clear()
    return Calibration(", ".join(dict.fromkeys(map(_name, devices))), tuple(found.values()))


def _filled(call: Call, device: torch.device) -> Call:
    """The call with values; the same ones for every kernel, and none that moves torch's random state."""
    generator = torch.Generator(device).manual_seed(0)

    def like(t: Tensor | None, name: str) -> Tensor | None:
        if t is None:
            return None
        made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
        if t.dtype == torch.bool:
            return made.copy_(torch.rand(t.shape, generator=generator, device=device) < 0.8)
        made.normal_(generator=generator)
        if name in ("weight", "running_var"):
            made.abs_().add_(0.5)
        return made.requires_grad_(t.requires_grad)

    names = ("x", "weight", "bias", "running_mean", "running_var", "residual", "mask")
    return call._replace(**{name: like(getattr(call, name), name) for name in names})


def _leaves(call: Call) -> list[Tensor]:
    tensors = (call.x, call.weight, call.bias, call.residual)
    return [t for t in tensors if t is not None and t.requires_grad]


def _step(call: Call, gradients: bool, run: Callable[[Call], Tensor], dy: Tensor) -> Callable[[], list[Tensor]]:
    leaves = _leaves(call)

    def step() -> list[Tensor]:
        with torch.set_grad_enabled(gradients):
            y = run(call)
        return [y.detach(), *(torch.autograd.grad(y, leaves, dy) if gradients else ())]

    return step


def _time(call: Call, gradients: bool, device: torch.device) -> Timed:
    from . import dispatch

    call = _filled(call, device)
    dy = torch.empty_like(call.x).normal_(generator=torch.Generator(device).manual_seed(1))
    steps = {}
    for kernel in ("native", "triton"):

        def run(call: Call, kernel: str = kernel) -> Tensor:
            with dispatch.use(kernel):
                return dispatch.run(call)

        steps[kernel] = _step(call, gradients, run, dy)
    try:
        wrong = _wrong(call, gradients, dy, steps["triton"]())
    except Exception as error:  # a compiler's errors have many names
        wrong = f"raise {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    if wrong:
        return Timed(0.0, 0.0, 0.0, (0.0, 0.0), wrong)
    times = _interleaved(steps, device)
    ratios = [a / b for a, b in zip(times["native"], times["triton"], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return Timed(statistics.median(times["native"]), statistics.median(times["triton"]), ratio, (low, high))


def _wrong(call: Call, gradients: bool, dy: Tensor, found: list[Tensor]) -> str:
    """A phrase that says what is off from float64 by more than rounding, or ""; by root mean squares."""
    doubled = {name: getattr(call, name) for name in ("x", "weight", "bias", "residual", "running_mean", "running_var")}
    doubled = {
        name: None if t is None else t.detach().double().requires_grad_(t.requires_grad) for name, t in doubled.items()
    }
    true = call._replace(**doubled)
    layout = call.spec.layout(call.x.shape)
    truth = _step(true, gradients, lambda c: native.formula(c, layout), dy.double())()
    named = [n for n in ("x", "weight", "bias", "residual") if (t := doubled[n]) is not None and t.requires_grad]
    summed = torch.finfo(torch.float64 if call.x.dtype == torch.float64 else torch.float32).eps
    for name, a, b in zip(["the output", *(f"the gradient of {n}" for n in named)], found, truth, strict=True):
        allowed = 16 * (torch.finfo(call.x.dtype).eps + (math.sqrt(call.x.numel()) + 1) * summed)
        error, scale = ((t.double().square().mean().sqrt().item()) for t in (a.double() - b, b))
        if not error <= allowed * scale:  # NaN too
            return f"are wrong here: {name} is off from float64 by {error:.2g}, and allowed {allowed * scale:.2g}"
    return ""


def _interleaved(steps: dict[str, Callable[[], object]], device: torch.device) -> dict[str, list[float]]:
    """Seconds a call, in turns."""
    inner = {}
    for name, step in steps.items():
        for _ in range(3):
            step()
        inner[name] = max(1, math.ceil(SAMPLE_SECONDS / max(_sample(step, 1, device), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS):
        for name in sorted(steps, reverse=bool(turn % 2)):
            times[name].append(_sample(steps[name], inner[name], device))
    return times


def _sample(step: Callable[[], object], inner: int, device: torch.device) -> float:
    if device.type != "cuda":
        return by_clock(step, inner)
    with torch.cuda.device(device):
        return by_events(step, inner)


def by_clock(call: Callable[[], object], inner: int) -> float:
    """Seconds a call by the host's clock, over `inner` of them."""
    began = time.perf_counter()
    for _ in range(inner):
        call()
    return (time.perf_counter() - began) / inner


def by_events(call: Callable[[], object], inner: int) -> float:
    """Seconds a call between two events of the current GPU, over `inner` of them and after one that is not counted."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()  # the GPU is busy with it while the host prepares the next
    start.record()
    for _ in range(inner):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / inner
